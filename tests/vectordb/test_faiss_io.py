"""FAISS indexes in and out keep vectors, ids, metric and lists."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from quantforge.errors import InputError, UnsupportedError
from quantforge.vectordb import IndexConfig, QuantizedIndex
from quantforge.vectordb.faiss_io import from_faiss, to_faiss
from tests.vectordb.data import skewed

faiss = pytest.importorskip("faiss")
DIM, N = 32, 1500
X, Q = skewed(N, DIM).numpy(), skewed(25, DIM, 1).numpy()
IDS = np.random.RandomState(0).permutation(10 * N)[:N]


def built(kind: str, metric: Any) -> tuple[Any, np.ndarray]:
    """Return a FAISS index of X and the ids of its vectors."""
    if kind == "flat":
        index, ids = faiss.IndexFlat(DIM, metric), np.arange(N)
        index.add(X)
        return index, ids
    if kind == "mapped":
        index = faiss.IndexIDMap(faiss.IndexFlat(DIM, metric))
    else:
        quantizer = faiss.IndexFlat(DIM, metric)
        index = faiss.IndexIVFFlat(quantizer, DIM, 10, metric)
        index.own_fields = True
        quantizer.this.disown()
        index.train(X)
        index.nprobe = 10
    index.add_with_ids(X, IDS)
    return index, IDS


@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
@pytest.mark.parametrize("kind", ["flat", "mapped", "ivf"])
def test_in(kind: str, metric: int) -> None:
    theirs, ids = built(kind, metric)
    name = "l2" if metric == faiss.METRIC_L2 else "ip"
    index = from_faiss(theirs, IndexConfig(bits=8, metric=name))  # type: ignore[arg-type]
    assert from_faiss(theirs).config.metric == name
    assert len(index) == N
    np.testing.assert_array_equal(np.sort(index.ids), np.sort(ids))
    error = np.linalg.norm(index.reconstruct(ids) - X) / np.linalg.norm(X)
    assert error < 0.02
    expected, found = theirs.search(Q, 5)[1], index.search(Q, 5)[0]
    assert np.mean([len(set(a) & set(b)) for a, b in zip(expected, found, strict=True)]) > 4.7


@pytest.mark.parametrize("nlist", [0, 8])
@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_out(metric: str, nlist: int) -> None:
    index = QuantizedIndex(DIM, IndexConfig(bits=8, metric=metric, nlist=nlist))  # type: ignore[arg-type]
    index.add(X, ids=IDS)
    theirs = to_faiss(index)
    assert theirs.ntotal == N
    assert theirs.d == DIM
    queries = Q / np.linalg.norm(Q, axis=1, keepdims=True) if metric == "cosine" else Q
    scores, ids = theirs.search(queries, 5)
    found, own = index.search(Q, 5)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(ids, found, strict=True)]) > 4.5
    np.testing.assert_allclose(scores[:, 0], own[:, 0], atol=0.03 * np.abs(scores).max())
    again = from_faiss(theirs, index.config)
    np.testing.assert_array_equal(np.sort(again.ids), np.sort(IDS))


def test_nothing_goes_in_and_out() -> None:
    empty = to_faiss(QuantizedIndex(DIM))
    assert empty.ntotal == 0
    assert len(from_faiss(empty)) == 0


def test_refused() -> None:
    with pytest.raises(UnsupportedError, match="IndexPQ"):
        from_faiss(faiss.IndexPQ(DIM, 4, 4))
    with pytest.raises(UnsupportedError, match="metric"):
        from_faiss(faiss.IndexFlat(DIM, faiss.METRIC_L1))
    with pytest.raises(InputError, match="metric"):
        from_faiss(faiss.IndexFlat(DIM, faiss.METRIC_L2), IndexConfig(metric="cosine"))


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UnsupportedError, match="pip install faiss-cpu"):
        to_faiss(QuantizedIndex(DIM))
