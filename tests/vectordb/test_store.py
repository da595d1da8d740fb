"""An index in a folder: what is acknowledged stays, whatever happens."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from quantforge.errors import FormatError, InputError
from quantforge.vectordb import IndexConfig, IndexStore, QuantizedIndex
from quantforge.vectordb.manifest import Checksum, Manifest
from tests.vectordb.data import skewed

DIM = 32
X, Q = skewed(400, DIM), skewed(5, DIM, 1)


def same(a: QuantizedIndex, b: QuantizedIndex) -> None:
    """Assert that two indexes hold and find the same."""
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.reconstruct(a.ids), b.reconstruct(b.ids))
    assert a.metadata(a.ids) == b.metadata(b.ids)
    for ours, theirs in zip(a.search(Q, 5), b.search(Q, 5), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def changed(target: IndexStore | QuantizedIndex) -> None:
    """Change a store, or an index, in all ways."""
    target.add(X[:200])
    target.add(X[200:300], ids=np.arange(1000, 1100), metadata={"odd": [i % 2 for i in range(100)]})
    target.remove_ids([0, 7, 1003])
    target.update([5, 1001], X[300:302], metadata=[{"odd": 5}, {}])
    target.add(X[302:310])


@pytest.mark.parametrize("settings", [
    {}, {"mode": "oblivious", "metric": "l2", "bits": 2}, {"mode": "centred", "metric": "cosine"},
    {"originals": "float16"}, {"nlist": 4},
])  # fmt: skip
def test_a_store_is_its_index_and_opens_as_it_was(tmp_path: Path, settings: dict) -> None:
    expected = QuantizedIndex(DIM, IndexConfig(**settings))
    changed(expected)
    with IndexStore.create(tmp_path / "s", DIM, IndexConfig(**settings)) as store:
        changed(store)
        same(store.index, expected)
    for read_only in (True, False):
        with IndexStore.open(tmp_path / "s", read_only=read_only) as store:
            same(store.index, expected)
            np.testing.assert_array_equal(
                store.index.search(Q, 2, where={"odd": 1})[0],
                expected.search(Q, 2, where={"odd": 1})[0],
            )
    with IndexStore.open(tmp_path / "s") as store:
        store.compact()
        same(store.index, expected)
        store.verify()
        np.testing.assert_array_equal(store.add(X[:2]), expected.add(X[:2]))
    with IndexStore.open(tmp_path / "s") as store:
        same(store.index, expected)


def test_string_ids(tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(50)]
    with IndexStore.create(tmp_path, DIM) as store:
        assert store.add(X[:40], names[:40]).tolist() == names[:40]
        assert store.add(X[40:50], names[40:]).tolist() == names[40:]
        store.remove_ids(["n3", "n45"])
        store.update(["n4"], X[60:61])
        expected = store.index.copy()
    with IndexStore.open(tmp_path) as store:
        same(store.index, expected)
        assert "n45" not in store.index.ids
        with pytest.raises(InputError, match="'n45' is not in the index"):
            store.remove_ids(["n45"])


def test_lists_made_by_growth_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IndexConfig, "lists_for", lambda self, n: 4 if n >= 300 else 1)
    with IndexStore.create(tmp_path, DIM) as store:
        store.add(X[:290])
        store.add(X[290:])
        assert store.index.nlist == 4
        assert store.log_bytes < 100  # a new base
        expected = store.index.copy()
    with IndexStore.open(tmp_path) as store:
        same(store.index, expected)


def test_a_base_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantforge.vectordb.store.SHARD_BYTES", 4000)
    with IndexStore.create(tmp_path, DIM) as store:
        store.add(X)
        files = sorted(tmp_path.glob("base-*"))
        assert len(files) > 3
        store.add(X[:10])
        store.compact()
        assert not [path for path in files if path.exists()]
        expected = store.index.copy()
    with IndexStore.open(tmp_path) as store:
        same(store.index, expected)
        store.verify()
    next(tmp_path.glob("base-*-00002-of-*")).unlink()
    with pytest.raises(FormatError, match=r"-00002-of-.* is missing"):
        IndexStore.open(tmp_path)


def test_an_empty_store_and_training(tmp_path: Path) -> None:
    with IndexStore.create(tmp_path / "a", DIM) as store:
        assert len(store) == len(store.add(X[:0])) == 0
    with IndexStore.open(tmp_path / "a") as store:
        assert not store.index.is_trained
        store.train(X)
        store.add(X[:10])
    with IndexStore.open(tmp_path / "a", read_only=True) as store:
        expected = QuantizedIndex(DIM)
        expected.train(X)
        expected.add(X[:10])
        same(store.index, expected)
    with IndexStore.create_from(tmp_path / "b", expected) as store:
        store.add(X[10:20])
    with IndexStore.open(tmp_path / "b", read_only=True) as store:
        expected.add(X[10:20])
        same(store.index, expected)


def test_a_batch_is_all_or_nothing(tmp_path: Path) -> None:
    with IndexStore.create(tmp_path, DIM) as store:
        with store.batch():
            store.add(X[:100])
            store.remove_ids([1])
        with store.batch():
            store.add(X[100:110], ids=np.arange(500, 510))
            store.update([500], X[:1])
            with pytest.raises(InputError, match="id 501 is in the index"):
                store.add(X[:1], ids=[501])
        before = store.index.copy()
        reader = IndexStore.open(tmp_path, read_only=True)

        def fail() -> None:
            with store.batch():
                store.add(X[110:120])
                assert len(store) == 119
                store.remove_ids([1])

        with pytest.raises(InputError, match="id 1 is not in the index"):
            fail()
        same(store.index, before)
        assert not reader.refresh()
        same(reader.index, before)
        with store.batch(), pytest.raises(InputError, match="do not nest"), store.batch():
            pass
    with IndexStore.open(tmp_path) as store:
        same(store.index, before)


def test_bad_input_changes_nothing(tmp_path: Path) -> None:
    with IndexStore.create(tmp_path, DIM) as store:
        store.add(X[:100])
        before, size = store.index.copy(), store.log_bytes
        for call, message in (
            (lambda: store.add(X[:, :8]), "32"),
            (lambda: store.add(X[:1], ids=[7]), "id 7 is in the index"),
            (lambda: store.update([500], X[:1]), "500 is not"),
            (lambda: store.remove_ids([500]), "500 is not"),
            (lambda: store.add(X[:1] * torch.nan), "NaN"),
            (lambda: store.train(X), "holds 100 vectors"),
            (lambda: IndexStore.create(tmp_path, DIM), "is open for writing in process"),
            (lambda: IndexStore.open(tmp_path), "is open for writing in process"),
        ):
            with pytest.raises(InputError, match=message):
                call()
        same(store.index, before)
        assert store.log_bytes == size
    with pytest.raises(InputError, match="closed"):
        store.add(X)
    with pytest.raises(InputError, match="holds a store already"):
        IndexStore.create(tmp_path, DIM)
    with IndexStore.open(tmp_path, read_only=True) as store:
        for change in (lambda: store.add(X), store.compact, lambda: store.remove_ids([1])):
            with pytest.raises(InputError, match="read-only"):
                change()


def test_an_index_trained_directly_is_not_written_over_other_codes(tmp_path: Path) -> None:
    with IndexStore.create(tmp_path, DIM, IndexConfig(originals="float16")) as store:
        store.add(X)
        store.index.rebuild()
        with pytest.raises(InputError, match=r"compact\(\) keeps that"):
            store.add(X[:1])
        store.compact()
        store.add(X[:1])


def test_readers_beside_a_writer(tmp_path: Path) -> None:
    with IndexStore.create(tmp_path, DIM) as store:
        store.add(X[:100])
        reader = IndexStore.open(tmp_path, read_only=True)
        held = reader.index
        before = held.copy()
        store.add(X[100:110])
        same(held, before)
        assert reader.refresh()
        assert reader.index is held
        same(held, store.index)
        assert not reader.refresh()
        store.compact()
        assert not list(tmp_path.glob("*-00000002*"))
        same(held, store.index)  # of files that are gone
        assert reader.refresh()
        store.remove_ids([3])
        assert reader.refresh()
        same(reader.index, store.index)
        reader.verify()


# ---- crashes --------------------------------------------------------------------------------


def vector(step: int, name: int) -> np.ndarray:
    return np.random.RandomState(97 * step + name).standard_normal((1, 8)).astype(np.float32)


def model(steps: int) -> dict[int, int]:
    """Ids after so many steps, and the step that each vector is of."""
    found: dict[int, int] = {}
    for i in range(steps):
        if i % 4 == 0:
            found.pop(i - 8, None)
        if i % 4 in (0, 1):
            found[i] = i
        if i % 4 == 2:
            found[i - 1] = i
        if i % 4 == 3:
            found.pop(i - 2)
    return found


def take_step(store: IndexStore, i: int) -> None:
    """Do step i of the model; every fifth compacts too."""
    if i % 4 == 0:
        with store.batch():
            store.add(vector(i, i), ids=[i])
            if i >= 8:
                store.remove_ids([i - 8])
    elif i % 4 == 1:
        store.add(vector(i, i), ids=[i])
    elif i % 4 == 2:
        store.update([i - 1], vector(i, i - 1))
    else:
        store.remove_ids([i - 2])
    if i % 5 == 4:
        store.compact()


def steps_of(store: IndexStore, candidates: range) -> int:
    """Return which state of the model a store is in; another one is an error."""
    index = store.index
    ids = sorted(index.ids.tolist())
    for steps in candidates:
        expected = model(steps)
        if ids == sorted(expected):
            decoded = index.reconstruct(ids) if ids else np.empty((0, 8))
            exact = [vector(expected[i], i)[0] for i in ids]
            if all(np.square(a - b).mean() < 0.01 for a, b in zip(decoded, exact, strict=True)):
                return steps
    raise AssertionError(f"{ids} is no state after {candidates} steps")


@pytest.fixture
def stepped(tmp_path: Path) -> Path:
    """Return the folder of a store before step 0."""
    IndexStore.create(tmp_path / "s", 8, IndexConfig(bits=8, mode="oblivious")).close()
    with IndexStore.open(tmp_path / "s") as store:
        store.train(vector(0, 0))
    return tmp_path / "s"


@contextmanager
def writer(folder: Path, start: int) -> Iterator[int]:
    """Yield the pipe on which a fork acknowledges steps from `start`; kill it at the end."""
    acks, ack = os.pipe()
    child = os.fork()
    if not child:
        try:
            store = IndexStore.open(folder)
            for i in range(start, start + 10_000):
                take_step(store, i)
                os.write(ack, b".")
        finally:
            os._exit(1)
    os.close(ack)
    try:
        yield acks
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_killed_200_times_nothing_acknowledged_is_lost(stepped: Path) -> None:
    random, steps = np.random.RandomState(0), 0
    for _ in range(200):
        with writer(stepped, steps) as acks:
            done = sum(len(os.read(acks, 1)) for _ in range(random.randint(4)))
            time.sleep(random.uniform(0, 0.004))
        while late := os.read(acks, 100):
            done += len(late)
        os.close(acks)
        with IndexStore.open(stepped, read_only=True) as store:
            steps = steps_of(store, range(steps + done, steps + done + 2))
    with IndexStore.open(stepped) as store:
        store.verify()
        assert len(os.listdir(stepped)) == 4
    assert steps > 200


def test_readers_see_states_in_order_while_another_process_writes(stepped: Path) -> None:
    with (
        IndexStore.open(stepped, read_only=True) as reader,
        writer(stepped, 0) as acks,
    ):
        seen, end = 0, time.monotonic() + 20
        while seen < 40 and time.monotonic() < end:
            reader.refresh()
            seen = steps_of(reader, range(seen, seen + 200))
    os.close(acks)
    assert seen >= 40


def test_a_crash_at_any_call_of_a_compaction_loses_nothing(stepped: Path) -> None:
    with IndexStore.open(stepped) as store:
        for i in range(3):
            take_step(store, i)
    for calls in range(1, 100):
        child = os.fork()
        if not child:
            left = [calls]

            def dying(function: Callable, left: list[int] = left) -> Callable:
                def call(*args: object, **kwargs: object) -> object:
                    left[0] -= 1
                    if not left[0]:
                        os._exit(9)
                    return function(*args, **kwargs)

                return call

            try:
                store = IndexStore.open(stepped)
                for name in ("fsync", "replace", "unlink", "open", "pread"):
                    setattr(os, name, dying(getattr(os, name)))
                store.compact()
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with IndexStore.open(stepped) as store:
            assert steps_of(store, range(3, 4)) == 3
            assert len(os.listdir(stepped)) == 4
        assert status in (0, 9)
        if status == 0:
            break
    assert calls > 8


def last_record(folder: Path) -> tuple[Path, int]:
    """Return the log of a store, and where its last record begins once one is added."""
    with IndexStore.open(folder) as store:
        take_step(store, 0)
        take_step(store, 1)
        start = store.log_bytes
        take_step(store, 2)
        return next(folder.glob("log-*")), start


def test_a_last_record_that_is_cut_or_damaged_anywhere_did_not_happen(stepped: Path) -> None:
    log, start = last_record(stepped)
    whole = log.read_bytes()
    for i in range(start, len(whole)):
        for content in (whole[:i], whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :]):
            log.write_bytes(content)
            with IndexStore.open(stepped, read_only=True) as store:
                ids = store.index.ids.tolist()
                assert ids == [0, 1], i
    assert steps_of(IndexStore.open(stepped), range(2, 3)) == 2
    log.write_bytes(whole)
    assert steps_of(IndexStore.open(stepped), range(2, 4)) == 3


def test_damage_elsewhere_is_an_error_that_names_file_and_place(stepped: Path) -> None:
    log, _ = last_record(stepped)
    base = next(stepped.glob("base-*"))
    for path, at, message in (
        (log, 40, f"{log}: the record at byte 32 is damaged"),
        (log, 10, f"{log}: the first 32 bytes"),
        (stepped / "manifest.json", 30, "manifest.json"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(FormatError, match=message):
            IndexStore.open(stepped)
        path.write_bytes(whole)
    whole = base.read_bytes()
    base.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with IndexStore.open(stepped) as store, pytest.raises(FormatError, match=f"{base} is damaged"):
        store.verify()
    base.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=f"{base} must have {len(whole)} bytes"):
        IndexStore.open(stepped)
    base.write_bytes(whole)
    for path in (base, log, stepped / "manifest.json"):
        moved = path.rename(stepped / "elsewhere")
        with pytest.raises(FormatError, match=f"{path} is missing"):
            IndexStore.open(stepped)
        moved.rename(path)
    assert steps_of(IndexStore.open(stepped), range(3, 4)) == 3


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_changes_nothing(tmp_path: Path) -> None:
    with IndexStore.create(tmp_path, DIM) as store:
        store.add(X[:100])
        before = store.index.copy()
        with files_of_at_most(200):
            with pytest.raises(OSError, match=r"File too large: .* could not be written.*log-"):
                store.add(X[100:200])
            with pytest.raises(OSError, match=r"could not be written.*log-"), store.batch():
                store.add(X[100:200])
            with pytest.raises(OSError, match=r"new base could not be written.*base-"):
                store.compact()
        same(store.index, before)
        assert len(os.listdir(tmp_path)) == 4
        store.add(X[100:200])
        store.compact()
        expected = store.index.copy()
    with IndexStore.open(tmp_path) as store:
        same(store.index, expected)
    with files_of_at_most(200), pytest.raises(OSError, match="could not be written"):
        IndexStore.create_from(tmp_path / "new", expected)
    assert os.listdir(tmp_path / "new") == ["lock"]
    with IndexStore.create_from(tmp_path / "new", expected) as store:
        same(store.index, expected)


# ---- size -----------------------------------------------------------------------------------


def grown(folder: Path, rows: int) -> None:
    """Let the base of a store claim so many rows, in a sparse file."""
    path = next(folder.glob("base-*"))
    data = path.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:head])
    old = {name: entry["data_offsets"] for name, entry in table.items() if name != "__metadata__"}
    count, position = table["ids"]["shape"][0], 0
    for name in old:
        entry = table[name]
        if entry["shape"][:1] == [count]:
            entry["shape"][0] = rows
        nbytes = (
            int(np.prod(entry["shape"]))
            * (old[name][1] - old[name][0])
            // max(1, int(np.prod([count if n == rows else n for n in entry["shape"]])))
        )
        entry["data_offsets"] = [position, position + nbytes]
        position += nbytes
    text = json.dumps(table).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (start, stop) in old.items():
            kept = data[head + start : head + stop]
            if name == "lists.starts":
                kept = np.array([0, rows], "<i8").tobytes()
            file.seek(8 + len(text) + table[name]["data_offsets"][0])
            file.write(kept)
        file.truncate(8 + len(text) + position)
    found = Manifest.read(folder)
    found.files[path.name] = Checksum(path.stat().st_size, 0)
    found.write(folder)


def test_a_large_store_opens_at_once(tmp_path: Path) -> None:
    with IndexStore.create(tmp_path, 64, IndexConfig(nlist=0)) as store:
        store.add(skewed(1000, 64))
    grown(tmp_path, 100_000_000)
    assert next(tmp_path.glob("base-*")).stat().st_size > 4e9
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    with IndexStore.open(tmp_path, read_only=True) as store:
        opened = time.process_time() - start  # not what other processes take
        assert len(store) == 100_000_000
        # by row: who asks for an id has the order of all ids checked first
        assert store.index._known.decode(torch.tensor([0])).shape == (1, 64)
    assert opened < 0.1
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    assert faults < 2000  # 8 MB of pages, of more than 4 GB
