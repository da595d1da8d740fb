"""Vectors that are removed or replaced: what is found and held while rows wait to be dropped."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantforge.vectordb import IndexConfig, IndexStore, QuantizedIndex, mapped, removed
from quantforge.vectordb.ids import Ids
from quantforge.vectordb.rows import Growing
from tests.vectordb.data import clustered

DIM, LISTS, N = 32, 16, 1200
X, Q = clustered(N, DIM, 40), clustered(8, DIM, 40, 1)
NEW = clustered(N, DIM, 40, 2)
KINDS: dict[str, dict[str, Any]] = {
    "flat": {"nlist": 0, "bits": 3},
    "lists": {"nlist": LISTS, "metric": "l2", "originals": "int8"},
}
GONE = np.arange(0, N, 7)


def built(kind: str, *, strings: bool = False) -> QuantizedIndex:
    index = QuantizedIndex(DIM, IndexConfig(**KINDS[kind]))
    ids: Any = [f"#{i}" for i in range(N)] if strings else None
    index.add(X, ids, metadata={"year": np.arange(N) % 30})
    return index


def compacted(index: QuantizedIndex) -> QuantizedIndex:
    found = index.copy()
    found.compact()
    assert found._known.removed.count == 0
    return found


def assert_as_compact(index: QuantizedIndex) -> None:
    """Assert that nobody can tell marked rows from dropped ones."""
    other = compacted(index)
    n = len(other)
    assert len(index) == n == len(other._known.rows)
    np.testing.assert_array_equal(index.ids, other.ids)
    bitmap = np.packbits(np.arange(n) % 3 > 0, bitorder="little")
    options: tuple[dict[str, Any], ...] = (
        {}, {"nprobe": LISTS}, {"bitmap": bitmap}, {"where": {"year": {"lt": 9}}},
        {"ids": index.ids[5:40].tolist()}, {"nprobe": 1},
    )  # fmt: skip
    for option in options:
        ours, theirs = (i.search(Q, 9, **option) for i in (index, other))
        np.testing.assert_array_equal(ours[0], theirs[0], str(option))
        np.testing.assert_array_equal(ours[1], theirs[1])
    whole = index.search(Q, n, nprobe=LISTS)[0]
    assert all(len(set(row)) == n for row in whole.tolist())
    border = float(other.search(Q, 9)[1].mean())
    for ours, theirs in zip(
        index.range_search(Q, border), other.range_search(Q, border), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    for what in (index.reconstruct, index.metadata):
        expected = getattr(other, what.__name__)(other.ids[::9].tolist())
        np.testing.assert_array_equal(what(index.ids[::9].tolist()), expected)


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_marked_rows_are_as_dropped(kind: str, strings: bool) -> None:
    index = built(kind, strings=strings)
    names = index.ids if strings else None
    name = (lambda rows: [f"#{i}" for i in rows]) if strings else (lambda rows: rows)
    index.remove_ids(name(GONE))
    assert index._known.removed.count == len(GONE)
    assert_as_compact(index)
    index.update(name([1, 2, 3, 50]), NEW[:4], metadata={"year": [3, 4, 5, 6]})
    index.add(NEW[4:30], name(GONE[:26].tolist()), metadata={"year": [1] * 26})  # again
    assert index.metadata(name([50])) == [{"year": 6}]
    assert_as_compact(index)
    index.remove_ids(name(GONE[3:5].tolist()))
    index.add(NEW[30:32], name(GONE[3:5].tolist()))
    assert_as_compact(index)
    with pytest.raises(ValueError, match="is not in the index"):
        index.reconstruct(name([GONE[100]]))
    assert names is None or len(names) == N


@pytest.mark.parametrize("kind", KINDS)
def test_update_finds_the_new_vector(kind: str) -> None:
    index = built(kind)
    rows = np.arange(100, 160)
    index.update(rows, NEW[:60])
    exact = np.square(index.reconstruct(rows) - NEW[:60].numpy()).sum(1)
    assert (exact < 0.1 * NEW[:60].square().sum(1).numpy()).mean() > 0.9
    assert sorted(index.ids.tolist()) == list(range(N))
    assert_as_compact(index)


def test_many_are_dropped(tmp_path: Path) -> None:
    index = built("lists")
    few = int(removed.MAX_SHARE * N)
    index.remove_ids(np.arange(few))
    held = index.memory_report()
    assert len(index._known.rows) == N
    assert held["codes"] == built("lists").memory_report()["codes"]
    assert index.list_report()["removed"] == few
    index.save(tmp_path / "a.safetensors")
    assert len(index._known.rows) == N - few
    assert index.memory_report()["codes"] < held["codes"]
    assert len(QuantizedIndex.load(tmp_path / "a.safetensors")._known.rows) == N - few
    again = built("lists")
    again.remove_ids(np.arange(few + 1))
    assert len(again._known.rows) == N - few - 1
    again.remove_ids(again.ids)
    assert len(again) == 0
    again.add(X[:3], ["now", "strings", "are right"])


def test_shards_and_merges_have_no_removed_rows() -> None:
    index = built("lists")
    before = index.search(Q, 9, nprobe=LISTS)[1]
    index.remove_ids(GONE)
    expected = index.search(Q, 9, nprobe=LISTS)
    parts = index.shard(3)
    parts[1].remove_ids(parts[1].ids[:4])
    removed_too = parts[1].copy()
    parts[0].merge(parts[1])
    assert len(parts[0]) == len(parts[1]) + len(index) // 3 + (len(index) % 3 > 0)
    assert len(removed_too) == len(parts[1])
    assert (expected[1] >= before).all()
    assert index.calibrate(0.9).recall >= 0.9


def test_ids_are_found_after_many_changes() -> None:
    random = np.random.RandomState(0)
    keys = Growing(torch.empty(0, dtype=torch.int64))
    ids, rows = Ids(keys), dict[int, int]()
    for _ in range(60):
        there = np.array(sorted(rows), np.int64)
        gone = there[random.random_sample(len(there)) < 0.3]
        if len(gone):
            ids.removed.mark(ids.rows_of(gone), len(ids))
            for key in gone.tolist():
                del rows[key]
        new = np.setdiff1d(random.permutation(200)[:25], sorted(rows))
        random.shuffle(new)
        parsed = ids.check_new(new, len(new))
        start = len(ids)
        keys.append(parsed.keys)
        ids.append(parsed)
        rows |= {int(key): start + i for i, key in enumerate(new)}
        wanted = list(rows)
        assert ids.rows_of(wanted).tolist() == [rows[key] for key in wanted]


# ---- rows of a file that is mapped -------------------------------------------------------------


def own_bytes(part: torch.Tensor) -> int:
    """Return the bytes of a tensor that are this process's own, not those of a file."""
    start, total, inside = part.data_ptr(), 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(word, 16) for word in words[0].split("-"))
            inside = max(min(end, start + part.nbytes) - max(begin, start), 0)
        elif words[0] == "Anonymous:":  # of a mapping that may go on beyond the tensor
            total += min(1024 * int(words[1]), inside)
    return total


BIG, WIDE = 20_000, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("store") / "shelf"
    config = IndexConfig(bits=8, mode="centred", nlist=16)
    with IndexStore.create(found, WIDE, config) as store:
        store.train(clustered(2000, WIDE, 40))
        store.add(clustered(BIG, WIDE, 40))
        store.compact()
        store.add(clustered(50, WIDE, 40, 1))
        store.remove_ids(np.arange(0, 4000, 2))
        store.update(np.arange(1, 200, 2), clustered(100, WIDE, 40, 3))
    return found


def test_a_store_with_a_log_opens_without_a_copy_of_its_rows(folder: Path) -> None:
    with IndexStore.open(folder, read_only=True) as store:
        index = store.index
        codes = index._known.rows["packed0"]
        assert mapped.place_of(codes[:BIG]) is not None
        assert codes.nbytes > 2 << 20
        assert own_bytes(codes) < codes.nbytes // 4
        assert len(index) == BIG + 50 - 2000
        queries, other = clustered(20, WIDE, 40, 6), compacted(index)
        for ours, theirs in zip(index.search(queries, 5), other.search(queries, 5), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        index.remove_ids([1, 3, 5])
        index.add(clustered(60, WIDE, 40, 5))
        assert own_bytes(index._known.rows["packed0"]) < codes.nbytes // 4


def test_room_behind_a_file(tmp_path: Path) -> None:
    data = np.random.RandomState(0).randint(0, 256, (30_000, 100), np.uint8)
    path = tmp_path / "rows"
    path.write_bytes(b"some bytes before" + data.tobytes() + b"and some behind")
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    rows = whole[17 : 17 + data.size].view(data.shape)
    growing = Growing(rows)
    growing.put(torch.tensor([0, 29_999]), torch.full((2, 100), 7, dtype=torch.uint8))
    growing.append(torch.full((500, 100), 9, dtype=torch.uint8))
    data[[0, -1]] = 7
    np.testing.assert_array_equal(growing.rows[:30_000].numpy(), data)
    assert bool((growing.rows[30_000:] == 9).all())
    kept = path.read_bytes()
    assert kept.startswith(b"some bytes before")
    assert kept.endswith(b"and some behind")
    assert own_bytes(growing.rows) < 1 << 20
    buffer = growing.rows
    del growing, rows, whole
    gc.collect()
    assert bool((buffer[30_000:] == 9).all())  # the mapping lives as long as its tensors


def test_rows_of_a_file_that_is_gone_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(range(256)) * (1 << 14))
    rows = torch.from_file(str(path), shared=False, size=1 << 22, dtype=torch.uint8).view(-1, 64)
    path.unlink()
    path.write_bytes(bytes(1 << 22))
    assert mapped.with_room(rows, 2 * len(rows)) is None
    growing = Growing(rows)
    growing.append(rows[:3].clone())
    assert torch.equal(growing.rows[:-3], rows)
