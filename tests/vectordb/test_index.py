"""The flat index: what it finds, what it refuses, what it holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantforge.errors import ConfigError, FormatError, InputError
from quantforge.io import save_file
from quantforge.vectordb import IndexConfig, QuantizedIndex
from tests.vectordb.data import recall, skewed

DIM = 64
GOLDEN = Path(__file__).parents[1] / "golden"
X, Q = skewed(2000, DIM), skewed(50, DIM, 1)


def built(**settings: Any) -> QuantizedIndex:
    index = QuantizedIndex(DIM, IndexConfig(**settings))
    index.add(X)
    return index


def exact(metric: str, x: torch.Tensor = X, q: torch.Tensor = Q) -> torch.Tensor:
    if metric == "l2":
        return -(torch.cdist(q.double(), x.double()) ** 2)
    if metric == "cosine":
        x, q = torch.nn.functional.normalize(x), torch.nn.functional.normalize(q)
    return q.double() @ x.double().T


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("mode", ["oblivious", "centred", "adapted"])
def test_finds_the_nearest(mode: str, metric: str) -> None:
    index = built(mode=mode, metric=metric, bits=8)
    ids, scores = index.search(Q, 10)
    truth = exact(metric)
    assert recall(torch.from_numpy(ids), truth.topk(10).indices) > 0.93
    sign = -1 if metric == "l2" else 1
    expected = sign * truth.gather(1, torch.from_numpy(ids)).numpy()
    assert np.abs(scores - expected).max() < 0.03 * float(truth.abs().max())
    assert (np.diff(sign * scores, axis=1) <= 0).all()


def test_adapted_finds_more_where_there_is_something_to_know() -> None:
    truth = exact("ip").topk(10).indices
    found = {
        mode: recall(torch.from_numpy(built(mode=mode, bits=2).search(Q, 10)[0]), truth)
        for mode in ("centred", "adapted")
    }
    assert found["adapted"] > found["centred"] + 0.05  # .92 and .83


@pytest.mark.parametrize("dim", [64, 384])
def test_adapted_is_never_below_centred_on_isotropic_data(dim: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    x, q = torch.randn(2000, dim, generator=generator), torch.randn(100, dim, generator=generator)
    truth = exact("ip", x, q).topk(10).indices
    found = {}
    for mode in ("centred", "adapted"):
        index = QuantizedIndex(dim, IndexConfig(mode=mode, bits=2))
        index.add(x)
        found[mode] = recall(torch.from_numpy(index.search(q, 10)[0]), truth)
    assert found["adapted"] >= found["centred"]
    index.save(tmp_path / "index")
    loaded = QuantizedIndex.load(tmp_path / "index")
    some = [i.standard_errors(q, [1, 2]) for i in (index, loaded)]
    np.testing.assert_array_equal(*some)


def test_batches_and_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = built(), QuantizedIndex(DIM)
    parts.train(X.split(100))
    for batch in (X[:0], X[:1], X[1:700], X[700:]):
        parts.add(batch)
    monkeypatch.setattr("quantforge.vectordb.scan.TILE_SCORES", 1)
    np.testing.assert_array_equal(parts.search(Q, 5)[0][:, 0], whole.search(Q, 5)[0][:, 0])
    assert len(parts) == 2000


def test_own_ids_update_and_remove() -> None:
    index = QuantizedIndex(DIM)
    ids = np.arange(2000) * 7 + 3
    np.testing.assert_array_equal(index.add(X.numpy(), ids), ids)
    before = index.search(Q, 3)[0]
    index.remove_ids(before[0])
    after = index.search(Q, 3)[0]
    assert not set(before[0]) & set(after.flatten())
    assert len(index) == 1997
    target = int(index.ids[5])
    index.update([target], 5 * Q[:1])
    assert index.search(Q[:1], 1)[0][0, 0] == target
    error = np.square(index.reconstruct([target]) - 5 * Q[:1].numpy()).sum()
    assert error < 0.05 * float((5 * Q[:1]).square().sum())
    assert index.add(X[:1])[0] == 1999 * 7 + 4


def test_filters() -> None:
    index = built()
    allowed = np.arange(2000) % 3 == 0
    by_ids, _ = index.search(Q, 5, ids=np.flatnonzero(allowed))
    by_bits, _ = index.search(Q, 5, bitmap=np.packbits(allowed, bitorder="little"))
    np.testing.assert_array_equal(by_ids, by_bits)
    assert (by_ids % 3 == 0).all()
    few, few_scores = index.search(Q, 5, ids=[4, 8])
    assert (np.sort(few[:, :2]) == [4, 8]).all()
    assert (few[:, 2:] == -1).all()
    assert (few_scores[:, 2:] == -np.inf).all()
    with pytest.raises(InputError, match="id 5000 is not in the index"):
        index.search(Q, 5, ids=[5000])
    with pytest.raises(InputError, match=r"bitmap must be uint8 of shape \(250,\)"):
        index.search(Q, 5, bitmap=allowed)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_range_search_is_a_search_with_a_threshold(metric: str) -> None:
    index = built(metric=metric)
    ids, scores = index.search(Q, 2000)
    threshold = float(scores[:, 20].mean())
    limits, found, values = index.range_search(Q, threshold)
    for i in range(len(Q)):
        good = scores[i] <= threshold if metric == "l2" else scores[i] >= threshold
        part = slice(limits[i], limits[i + 1])
        assert sorted(found[part]) == sorted(ids[i][good])
        np.testing.assert_array_equal(np.sort(values[part]), np.sort(scores[i][good]))


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
def test_rerank_by_originals_kept_or_fetched(metric: str) -> None:
    kept = built(metric=metric, bits=1, originals="float16")
    truth = exact(metric).topk(10).indices
    plain = recall(torch.from_numpy(kept.search(Q, 10)[0]), truth)
    ids, _ = kept.search(Q, 10, rerank=200)
    fetched, _ = built(metric=metric, bits=1).search(Q, 10, rerank=200, fetch=lambda i: X[i])
    assert recall(torch.from_numpy(ids), truth) > max(0.9, plain + 0.1)
    assert recall(torch.from_numpy(fetched), torch.from_numpy(ids)) > 0.98
    with pytest.raises(InputError, match="rerank needs vectors"):
        built().search(Q, 10, rerank=20)


def test_standard_errors_are_those_of_the_scores() -> None:
    index = built(mode="centred", bits=2)
    ids, scores = index.search(Q, 2000)
    wrong = scores - exact("ip").gather(1, torch.from_numpy(ids)).numpy()
    error = np.take_along_axis(index.standard_errors(Q, np.arange(2000)), ids, 1)
    assert 0.85 < np.sqrt(np.mean((wrong / error) ** 2)) < 1.15


@pytest.mark.parametrize("mode", ["oblivious", "centred", "adapted"])
def test_a_file_opened_in_another_process_finds_the_same(tmp_path: Path, mode: str) -> None:
    index = built(mode=mode, originals="float16")
    path = tmp_path / "index.safetensors"
    index.save(path)
    loaded = QuantizedIndex.load(path)
    assert loaded.config == index.config
    for ours, theirs in zip(index.search(Q, 5), loaded.search(Q, 5), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    program = (
        "import sys, torch; from quantforge.vectordb import QuantizedIndex\n"
        "print(QuantizedIndex.load(sys.argv[1]).search(torch.ones(1, 64), 3)[0].tolist())"
    )
    if mode == "adapted":
        call = [sys.executable, "-c", program, str(path)]
        said = subprocess.run(call, capture_output=True, text=True, check=True).stdout
        assert said.strip() == str(index.search(torch.ones(1, DIM), 3)[0].tolist())
    bytes_before = path.read_bytes()
    loaded.update([0], X[1:2])
    loaded.remove_ids([1])
    loaded.add(X[:10])
    assert path.read_bytes() == bytes_before


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    built().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError):
        QuantizedIndex.load(path)
    path.write_bytes(data.replace(b'\\"format\\": 2', b'\\"format\\": 9'))
    with pytest.raises(FormatError, match="index of format 9"):
        QuantizedIndex.load(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(FormatError, match="holds no index"):
        QuantizedIndex.load(path)


@pytest.mark.parametrize("kind", ["adapted_ip", "centred_cosine", "adapted_l2"])
def test_files_of_format_1_load(kind: str) -> None:
    golden = np.load(GOLDEN / "index_v1.npz")
    index = QuantizedIndex.load(GOLDEN / f"index_v1_{kind}.safetensors")
    ids, scores = index.search(golden["queries"], 10)
    expected = golden[f"{kind}_scores"]
    np.testing.assert_array_equal(ids[:, 0], golden[f"{kind}_ids"][:, 0])
    np.testing.assert_allclose(scores, expected, atol=1.5e-2 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["adapted_ip", "oblivious_l2"])
def test_files_of_format_2_load(kind: str) -> None:
    golden = np.load(GOLDEN / "index_v2.npz")
    index = QuantizedIndex.load(GOLDEN / f"index_v2_{kind}.safetensors")
    assert (index.nlist, len(index)) == (4, 200)
    ids, scores = index.search(golden["queries"], 10, nprobe=2)
    np.testing.assert_array_equal(ids[:, 0], golden[f"{kind}_ids"][:, 0])
    np.testing.assert_allclose(scores, golden[f"{kind}_scores"], rtol=1e-3)
    errors = index.standard_errors(golden["queries"], ["row 1", "row 195"])
    np.testing.assert_allclose(errors, golden[f"{kind}_errors"], rtol=1e-3)


def test_empty_indexes_are_saved_too(tmp_path: Path) -> None:
    index = QuantizedIndex(DIM)
    assert len(index.add(X[:0])) == 0
    assert not index.is_trained
    index.save(tmp_path / "a")
    assert not QuantizedIndex.load(tmp_path / "a").is_trained
    index.train(X)
    index.save(tmp_path / "b")
    loaded = QuantizedIndex.load(tmp_path / "b")
    loaded.add(X)
    index.add(X)
    np.testing.assert_array_equal(loaded.search(Q, 4)[0], index.search(Q, 4)[0])
    assert index.range_search(Q[:0], 0.0)[0].tolist() == [0]


def held_by(thing: Any, seen: dict[int, int]) -> int:
    """Return the bytes of all arrays that can be reached, each storage once."""
    if isinstance(thing, torch.Tensor):
        seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, np.ndarray):
        seen[thing.ctypes.data] = thing.nbytes
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            held_by(part, seen)
    elif type(thing).__module__.startswith("quantforge"):
        fields = getattr(thing, "__dict__", {})
        held_by({name: part for name, part in fields.items() if name != "config"}, seen)
    return sum(seen.values())


def test_memory_is_what_arrays_hold() -> None:
    index = built(originals="float16")
    index.add(X[:10])
    index.search(Q, 3)
    total = index.memory_report()["total"]
    assert total <= held_by(index, {}) <= 1.25 * total  # room for more is no memory yet
    index.remove_ids([3])
    index.compact()  # leaves no room
    assert index.memory_report()["total"] == pytest.approx(held_by(index, {}), rel=0.02)


def test_a_copy_is_its_own() -> None:
    index = built()
    other = index.copy()
    other.remove_ids(np.arange(1000))
    assert (len(index), len(other)) == (2000, 1000)


BAD = {
    "wrong dim": (lambda i: i.add(X[:, :32]), r"\(\.\.\., 64\)"),
    "one vector": (lambda i: i.add(X[0]), "must have shape"),
    "integers": (lambda i: i.add(X.int()), "floating-point"),
    "nan": (lambda i: i.add(torch.where(X > 1, torch.nan, X)), "NaN or infinity"),
    "too large": (lambda i: i.add(1e9 * X), "too large for the"),
    "ids twice": (lambda i: i.add(X[:2], [9000, 9000]), "9000 is given twice"),
    "ids there": (lambda i: i.add(X[:2], [9000, 7]), "id 7 is in the index"),
    "ids negative": (lambda i: i.add(X[:2], [-1, 7]), "from 0"),
    "ids count": (lambda i: i.add(X[:2], [9000]), "one id for each of the 2"),
    "ids floats": (lambda i: i.add(X[:1], [0.5]), "must be integers"),
    "unknown removed": (lambda i: i.remove_ids([3, 5000]), "id 5000 is not"),
    "unknown updated": (lambda i: i.update([5000], X[:1]), "id 5000 is not"),
    "k too large": (lambda i: i.search(Q, 2001), "from 1 to 2000"),
    "k zero": (lambda i: i.search(Q, 0), "k must be"),
    "nan query": (lambda i: i.search(Q * torch.nan, 1), "queries must be finite"),
    "train late": (lambda i: i.train(X), "holds 2000 vectors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(name: str) -> None:
    call, message = BAD[name]
    index = built()
    before = (index.ids, *index.search(Q, 5))
    with pytest.raises(InputError, match=message):
        call(index)
    for was, now in zip(before, (index.ids, *index.search(Q, 5)), strict=True):
        np.testing.assert_array_equal(was, now)


def test_bad_input_of_an_empty_index() -> None:
    index = QuantizedIndex(DIM)
    with pytest.raises(InputError, match="at least 2 vectors"):
        index.add(X[:1])
    with pytest.raises(InputError, match="from 1 to 0"):
        index.search(Q, 1)
    with pytest.raises(InputError, match="id 1 is not"):
        index.remove_ids([1])
    assert not index.is_trained
    with pytest.raises(InputError, match="no cosine"):
        QuantizedIndex(DIM, IndexConfig(metric="cosine")).add(torch.zeros(2, DIM))
    with pytest.raises(ConfigError, match="unknown settings"):
        IndexConfig.from_dict({"nbits": 4})
