"""Shards on several ranks: what one process finds, and what is left when ranks are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch.distributed as dist

from quantforge.errors import InputError
from quantforge.vectordb import IndexConfig, QuantizedIndex
from quantforge.vectordb.sharded import RankError, ShardedIndex
from quantforge.vectordb.shards import assign, merge_found, search_exactly

DIM, SHARDS = 32, 5


def tied(n: int = 600) -> np.ndarray:
    """Vectors of which each is there about eight times."""
    rng = np.random.RandomState(0)
    return rng.randn(n // 8, DIM).astype(np.float32)[rng.randint(0, n // 8, n)]


def save_shards(folder: Path, metric: str, *, texts: bool = False) -> QuantizedIndex:
    x = tied()
    whole = QuantizedIndex(DIM, IndexConfig(metric=metric))  # type: ignore[arg-type]
    ids = np.random.RandomState(1).permutation(len(x))
    whole.add(x, [f"id {i}" for i in ids] if texts else ids)
    folder.mkdir()
    for i, part in enumerate(whole.shard(SHARDS)):
        part.save(folder / f"{i}.safetensors")
    return whole


def new_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)


@contextmanager
def in_threads(folder: Path, world: int) -> Iterator[ShardedIndex]:
    store = new_store()

    def serve(rank: int) -> None:
        own = dist.TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=60))
        ShardedIndex(folder, own, rank, world).serve()

    threads = [Thread(target=serve, args=(rank,)) for rank in range(1, world)]
    for thread in threads:
        thread.start()
    index = ShardedIndex(folder, store, 0, world)
    try:
        yield index
    finally:
        index.close()
        for thread in threads:
            thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(("metric", "texts"), [("ip", False), ("l2", True), ("cosine", False)])
def test_any_world_finds_what_one_index_finds(tmp_path: Path, metric: str, texts: bool) -> None:
    whole = save_shards(tmp_path / "shards", metric, texts=texts)
    queries = np.random.RandomState(2).randn(7, DIM).astype(np.float32)
    expected = search_exactly(whole, queries, 20)
    # whole is checked too: all of it, sorted
    ids, scores = whole.search(queries, len(whole))
    by_hand = merge_found([(ids, scores)], 20, squared=metric == "l2")
    for world in (1, 2, 3, 5):
        with in_threads(tmp_path / "shards", world) as index:
            assert len(index) == len(whole)
            found = index.search(queries, 20)
        assert found.missing == {}
        for got, want, hand in zip(found, expected, by_hand, strict=True):
            np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(got, hand)
    assert len(np.unique(scores[0, :20])) < 20, "there must be ties"


def test_what_is_refused(tmp_path: Path) -> None:
    save_shards(tmp_path / "shards", "ip")
    with in_threads(tmp_path / "shards", 2) as index:
        with pytest.raises(InputError, match="k must be"):
            index.search(np.ones((1, DIM)), 601)
        with pytest.raises(InputError, match="must have shape"):
            index.search(np.ones((1, DIM + 1)), 1)
        with pytest.raises(InputError, match="on_failure"):
            index.search(np.ones((1, DIM)), 1, on_failure="none")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="cannot be left out"):
            index.rebalance(without=[0])
        assert index.search(np.ones((1, DIM)), 1)[0].shape == (1, 1)


WORKER = """
import sys
from datetime import timedelta
import torch.distributed as dist
from quantforge.vectordb.sharded import ShardedIndex
folder, port, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60))
ShardedIndex(folder, store, rank, 3).serve()
"""


def test_a_rank_that_hangs_or_dies(tmp_path: Path) -> None:
    whole, store = save_shards(tmp_path / "shards", "ip"), new_store()
    workers = {
        rank: subprocess.Popen(
            [sys.executable, "-c", WORKER, tmp_path / "shards", str(store.port), str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in (1, 2)
    }
    queries = np.random.RandomState(2).randn(3, DIM).astype(np.float32)
    expected = search_exactly(whole, queries, 10)
    try:
        index = ShardedIndex(tmp_path / "shards", store, 0, 3, timeout=60)
        np.testing.assert_array_equal(index.search(queries, 10)[0], expected[0])

        workers[2].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        partial = index.search(queries, 10, timeout=0.5, on_failure="partial")
        assert set(partial.missing) == {2}
        assert np.isfinite(partial[1]).all()
        for _ in range(2):  # requests pass it by
            with pytest.raises(RankError, match=r"no answer in 0\.5 s") as caught:
                index.search(queries, 10, timeout=0.5)
            assert set(caught.value.missing) == {2}
        assert time.monotonic() - start < 10
        workers[2].send_signal(signal.SIGCONT)
        found = index.search(queries, 10, on_failure="partial")
        assert found.missing == {}
        np.testing.assert_array_equal(found[0], expected[0])

        workers[1].kill()
        workers[1].wait(20)
        assert set(index.search(queries, 10, timeout=0.5, on_failure="partial").missing) == {1}
        assert set(index.rebalance(without=[1])) == {0, 2}
        np.testing.assert_array_equal(index.search(queries, 10)[0], expected[0])
        index.close()
        assert workers[2].wait(20) == 0
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait(20)


def test_shards_that_are_added_are_found(tmp_path: Path) -> None:
    whole = save_shards(tmp_path / "shards", "ip")
    with in_threads(tmp_path / "shards", 2) as index:
        more = whole.shard(SHARDS)[0]
        more.remove_ids(more.ids)
        more.add(10 * np.eye(DIM, dtype=np.float32)[:3], [9001, 9002, 9003])
        more.save(tmp_path / "shards" / "new.safetensors")
        spread = index.rebalance()
        assert sum("new.safetensors" in names for names in spread.values()) == 1
        assert len(index) == len(whole) + 3
        ids, _ = index.search(np.eye(DIM, dtype=np.float32)[:3], 1)
        assert ids[:, 0].tolist() == [9001, 9002, 9003]


def test_assignment_is_even_and_moves_little() -> None:
    first = assign({"a": 4, "b": 3, "c": 3, "d": 2}, [0, 1], {})
    assert first == {0: ["a", "d"], 1: ["b", "c"]}
    assert assign({"a": 4, "b": 3, "c": 3, "d": 2, "e": 1}, [0, 1], first) == {
        0: ["a", "d", "e"], 1: ["b", "c"],
    }  # fmt: skip
    assert assign({"a": 4, "b": 3, "c": 3, "d": 2}, [0], first) == {0: ["a", "b", "c", "d"]}
    moved = assign({"a": 4, "b": 3, "c": 3, "d": 2}, [0, 1, 2], first)
    assert {rank: len(names) for rank, names in moved.items()} == {0: 2, 1: 1, 2: 1}
    assert sum(len(set(first[r]) - set(moved[r])) for r in first) == 2  # no less gives 5, 4, 3
