"""What users of FAISS count on: shapes and dtypes, k, ids, ranges, removal, files, threads, input.

Where the index differs on purpose the test says how: too great a k, unknown ids and NaN are errors
here, and distances come as FAISS has them, squared and rising.
"""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.vectordb import IndexConfig, QuantizedIndex
from tests.helpers import threads
from tests.vectordb.data import skewed

faiss = pytest.importorskip("faiss")
DIM, N, K = 48, 1200, 7
X, Q = skewed(N, DIM).numpy(), skewed(31, DIM, 1).numpy()


def built(metric: str = "ip", bits: int = 8, **settings: object) -> QuantizedIndex:
    index = QuantizedIndex(DIM, IndexConfig(bits=bits, metric=metric, **settings))  # type: ignore[arg-type]
    index.add(X)
    return index


def flat(metric: str) -> faiss.Index:
    index = faiss.IndexFlatL2(DIM) if metric == "l2" else faiss.IndexFlatIP(DIM)
    index.add(X)
    return index


def shared(found: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, theirs, strict=True)]))


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_results_have_its_shapes_order_and_signs(metric: str) -> None:
    distances, theirs = flat(metric).search(Q, K)
    ids, scores = built(metric).search(Q, K)
    assert ids.shape == theirs.shape
    assert ids.dtype == theirs.dtype
    assert scores.shape == distances.shape
    assert scores.dtype == distances.dtype
    rising = np.diff(scores, axis=1) * (1 if metric == "l2" else -1)
    assert (rising >= 0).all()
    np.testing.assert_allclose(scores, distances, atol=0.05 * np.abs(distances).max())
    assert shared(ids, theirs) > 0.9


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("order", ["C", "F", "strided", "reversed", "read-only"])
def test_any_float_dtype_and_memory_order(order: str, dtype: type) -> None:
    expected = built().search(Q.astype(dtype), 1)[0]
    x, q = X.astype(dtype), Q.astype(dtype)
    if order == "F":
        q = np.asfortranarray(q)
    elif order == "strided":
        q = np.repeat(q, 2, axis=1)[:, ::2]
    elif order == "reversed":
        q = q[::-1].copy()[::-1]
    elif order == "read-only":
        q.setflags(write=False)
    index = QuantizedIndex(DIM, IndexConfig(bits=8))
    index.add(np.asfortranarray(x) if order == "F" else x)
    before = q.copy()
    found = index.search(q, 1)[0]
    np.testing.assert_array_equal(q, before)
    assert (found == expected).mean() > 0.95
    np.testing.assert_array_equal(found, index.search(torch.from_numpy(before), 1)[0])


def test_k_beyond_the_index_is_an_error_not_minus_one() -> None:
    assert (flat("ip").search(Q, N + 1)[1][:, N] == -1).all()
    index = built()
    assert sorted(index.search(Q[:1], N)[0][0]) == list(range(N))
    for k in (N + 1, 0, -1, 2.0):
        with pytest.raises(InputError, match="k must be"):
            index.search(Q, k)  # type: ignore[arg-type]


def test_one_at_a_time_finds_what_a_batch_finds() -> None:
    index = built(bits=3)
    ids, scores = index.search(Q, K)
    for i in range(len(Q)):
        one, score = index.search(Q[i : i + 1], K)
        np.testing.assert_array_equal(one[0], ids[i])
        np.testing.assert_array_equal(score[0], scores[i])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_threads_change_nothing(count: int) -> None:
    index = built(bits=3)
    with threads(1):
        expected = index.search(Q, K)
    with threads(count):
        found = index.search(Q, K)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_searches_run_side_by_side() -> None:
    index = built(bits=3)
    expected = index.search(Q, K)[0]
    with ThreadPoolExecutor(4) as pool:
        for ids, _ in pool.map(lambda _: index.search(Q, K), range(12)):
            np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_range_search(metric: str) -> None:
    theirs = flat(metric)
    middle = float(np.median(theirs.search(Q, 40)[0][:, -1]))
    limits, distances, labels = theirs.range_search(Q, middle)
    found_limits, ids, scores = built(metric).range_search(Q, middle)
    assert found_limits.shape == limits.shape
    assert found_limits[0] == 0
    assert found_limits[-1] == len(ids) == len(scores)
    assert (scores < middle).all() if metric == "l2" else (scores > middle).all()
    same = 0
    for i in range(len(Q)):
        a, b = limits[i : i + 2].astype(int), found_limits[i : i + 2]
        same += len(set(labels[slice(*a)]) & set(ids[slice(*b)]))
    assert same > 0.9 * len(labels)
    assert len(distances)
    nothing = built(metric).range_search(Q, -1.0 if metric == "l2" else 1e6)
    assert nothing[0].tolist() == [0] * (len(Q) + 1)


def test_own_ids_and_removal() -> None:
    theirs = faiss.IndexIDMap2(faiss.IndexFlatIP(DIM))
    names = 7 * np.arange(N)[::-1] + 3
    theirs.add_with_ids(X, names)
    index = QuantizedIndex(DIM, IndexConfig(bits=8))
    np.testing.assert_array_equal(index.add(X, ids=names), names)
    gone = names[::3]
    assert theirs.remove_ids(gone) == len(gone)
    index.remove_ids(gone)
    assert len(index) == theirs.ntotal
    found = index.search(Q, K)[0]
    assert not np.isin(found, gone).any()
    assert (found[:, 0] == theirs.search(Q, 1)[1][:, 0]).mean() > 0.85
    for unknown in (gone[:1], [-5], [10**12]):
        with pytest.raises(InputError):
            index.remove_ids(unknown)
    assert len(index) == theirs.ntotal
    np.testing.assert_allclose(
        index.reconstruct(names[1:2])[0], theirs.reconstruct(int(names[1])), atol=0.05
    )


def test_reconstruct_does_not_depend_on_order_or_company() -> None:
    index = built(bits=4)
    every = index.reconstruct(np.arange(N))
    assert every.shape == (N, DIM)
    assert every.dtype == np.float32
    pick = np.array([5, 900, 3])
    np.testing.assert_allclose(index.reconstruct(pick), every[pick], atol=1e-6)
    with pytest.raises(InputError):
        index.reconstruct([N])


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_round_trips_change_nothing(metric: str, bits: int, tmp_path: Path) -> None:
    index = built(metric, bits)
    ids, scores = index.search(Q, K)
    index.save(tmp_path / "index.safetensors")
    for other in (
        QuantizedIndex.load(tmp_path / "index.safetensors"),
        index.copy(),
        copy.deepcopy(index),
        pickle.loads(pickle.dumps(index)),
    ):
        found, same = other.search(Q, K)
        np.testing.assert_array_equal(found, ids)
        np.testing.assert_array_equal(same, scores)


def test_search_parameters_hold_for_one_search() -> None:
    """IVF's nprobe, as an argument: more lists find more, and more than there are find the same."""
    index = built(nlist=16, bits=8)
    before, theirs = index.search(Q, K)[0], flat("ip").search(Q, K)[1]
    few, many = (shared(index.search(Q, K, nprobe=n)[0], theirs) for n in (1, 16))
    assert few < many - 0.1
    assert many > 0.9
    every = index.search(Q, K, nprobe=16)[0]
    np.testing.assert_array_equal(index.search(Q, K, nprobe=99)[0], every)
    np.testing.assert_array_equal(index.search(Q, K)[0], before)


@pytest.mark.parametrize("nlist", [0, 16])
@pytest.mark.parametrize("kind", ["batch", "range", "bitmap", "not"])
def test_selectors(kind: str, nlist: int) -> None:
    """FAISS's IDSelectors let pass what `ids` and `bitmap` do."""
    mask = np.random.RandomState(0).random_sample(N) < 0.3
    if kind == "range":
        mask = (np.arange(N) >= 100) & (np.arange(N) < 350)
    allowed, bits = np.flatnonzero(mask), np.packbits(mask, bitorder="little")
    selector = {
        "batch": lambda: faiss.IDSelectorBatch(allowed),
        "range": lambda: faiss.IDSelectorRange(100, 350),
        "bitmap": lambda: faiss.IDSelectorBitmap(bits),
        "not": lambda: faiss.IDSelectorNot(faiss.IDSelectorBatch(np.flatnonzero(~mask))),
    }[kind]()
    theirs = flat("ip").search(Q, K, params=faiss.SearchParameters(sel=selector))[1]
    index = built(nlist=nlist)
    by_row = np.packbits(np.isin(index.ids, allowed), bitorder="little")
    found = index.search(Q, K, ids=allowed, nprobe=16)
    for ours in (found, index.search(Q, K, bitmap=by_row, nprobe=16)):
        assert np.isin(ours[0], allowed).all()
        assert shared(ours[0], theirs) > 0.9
        np.testing.assert_array_equal(ours[0], found[0])
        np.testing.assert_array_equal(ours[1], found[1])


def test_assignment_is_where_rows_lie() -> None:
    """FAISS's `quantizer.search(x, 1)` names the list that `add` puts a vector into."""
    index = built(nlist=16)
    core = index._known
    quantizer = faiss.IndexFlatL2(DIM)
    quantizer.add(core.partition.centroids.numpy())
    labels = quantizer.search(X, 1)[1][:, 0]
    rows = index._rows_of(np.arange(N))
    assert (core.lists.of_rows(rows).numpy() == labels).mean() > 0.999
    np.testing.assert_array_equal(
        index.list_report()["rows"], np.bincount(core.lists.of_rows(rows), minlength=16)
    )


def test_an_empty_index() -> None:
    index = QuantizedIndex(DIM)
    assert len(index) == 0
    assert len(index.add(X[:0])) == 0
    with pytest.raises(InputError):
        index.search(Q, 1)
    with pytest.raises(InputError):
        index.reconstruct([0])
    index.add(X)
    index.remove_ids(index.ids)
    assert len(index) == 0
    index.add(X[:50])
    assert len(index.search(Q, 3)[0]) == len(Q)
    assert built().search(Q[:0], 3)[0].shape == (0, 3)


def test_input_that_does_not_fit_changes_nothing() -> None:
    index = built()
    bad = X[:4].copy()
    bad[2, 5] = np.nan
    for vectors in (X[:, 1:], X[0], bad, X[:4].astype(str), [[1.0] * (DIM + 1)]):
        with pytest.raises((InputError, TypeError, ValueError)):
            index.add(vectors)
        with pytest.raises((InputError, TypeError, ValueError)):
            index.search(vectors, 2)
    assert len(index) == N
    np.testing.assert_array_equal(index.search(Q, K)[0], built().search(Q, K)[0])


def test_equal_vectors_come_in_the_order_of_rows() -> None:
    index = QuantizedIndex(DIM, IndexConfig(mode="oblivious"))
    index.add(np.repeat(X[:1], 30, axis=0))
    np.testing.assert_array_equal(index.search(X[:1], 30)[0][0], np.arange(30))
