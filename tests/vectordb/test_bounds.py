"""Lengths of rows follow them, and a search with them finds what one without them finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quantforge.ops.mixed_search.parts import rests_of
from quantforge.vectordb import IndexConfig, QuantizedIndex, scan
from quantforge.vectordb.bounds import MAX_REST, MIN_ROWS, RowBounds
from tests.vectordb.data import skewed

DIM, N = 64, 3000
X, Q = skewed(N, DIM), skewed(20, DIM, 1)


def bounds_of(index: QuantizedIndex) -> RowBounds:
    assert index._core is not None
    return index._core.bounds


def check(index: QuantizedIndex) -> None:
    """Compare what is held with what would be made anew."""
    core = index._core
    assert core is not None
    held, fresh = core.bounds.of(core.rows), RowBounds(core.codec).of(core.rows)
    assert held is not None
    assert fresh is not None
    assert torch.equal(held.rests, fresh.rests)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("nlist", [0, 12])
def test_lengths_follow_rows(nlist: int, metric: str) -> None:
    index = QuantizedIndex(DIM, IndexConfig(bits=2, nlist=nlist, metric=metric))
    index.add(X)
    index.search(Q, 3)
    check(index)
    index.add(X[:200])
    index.remove_ids(np.arange(0, 900, 7))
    check(index)
    index.update([5, 6, 2000], X[:3])
    check(index)
    index.add(X[:100])
    index.update([3100, 2500], X[7:9])
    check(index)


def test_a_search_without_bounds_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    index = QuantizedIndex(DIM, IndexConfig(bits=2))
    index.add(X)
    ids, scores = index.search(Q, 10)
    assert len(bounds_of(index)._rests.rows) == N
    monkeypatch.setattr("quantforge.vectordb.bounds.MIN_ROWS", N + 1)
    again, same = index.copy().search(Q, 10)  # a copy prepares its searches anew
    np.testing.assert_array_equal(ids, again)
    np.testing.assert_array_equal(scores, same)


def compare(index: QuantizedIndex) -> None:
    """Compare searches, which are prepared, with scores of all rows in torch."""
    core = index._core
    assert core is not None
    queries, there = core.codec.queries(Q), core.removed.left(len(core.rows))
    scores, rows = scan.best_by_tiles(core.shelf, queries, 10, None, there)
    ids = core.catalog.ids.names(rows)
    for found, values in (
        index.search(Q, 10),
        [
            np.concatenate(part)
            for part in zip(*(index.search(q[None], 10) for q in Q), strict=True)
        ],
    ):
        np.testing.assert_array_equal(found, ids)
        np.testing.assert_array_equal(values, scores.numpy())


def test_prepared_searches_follow_rows(tmp_path: Path) -> None:
    index = QuantizedIndex(DIM, IndexConfig(bits=2, nlist=0))
    index.add(X)
    compare(index)
    index.update([5, 2000], 3 * Q[:2])
    compare(index)
    index.add(3 * Q[2:9])
    compare(index)
    index.remove_ids(np.arange(0, 400, 7))
    compare(index)
    index.remove_ids(np.arange(401, 2000))  # so many that rows move
    compare(index)
    index.save(tmp_path / "index.safetensors")
    again = QuantizedIndex.load(tmp_path / "index.safetensors")
    compare(again)
    again.update([2500], 4 * Q[:1])
    compare(again)
    compare(index)


def test_a_margin_is_counted_as_memory_and_not_copied() -> None:
    index = QuantizedIndex(DIM, IndexConfig(bits=2, nlist=0))
    index.add(X)
    index.search(Q, 10)
    before = bounds_of(index).nbytes
    index.search(Q[:1], 10, two_stage=0.99)
    steps = bounds_of(index)._steps.nbytes
    assert bounds_of(index).nbytes == before + 2 * N + steps
    assert bounds_of(index.copy()).nbytes == before


def test_no_bounds_where_there_is_nothing_to_leave_out() -> None:
    for config, count in ((IndexConfig(mode="centred"), N), (IndexConfig(bits=2), MIN_ROWS - 1)):
        index = QuantizedIndex(DIM, config)
        index.add(X[:count])
        index.search(Q, 3)
        assert len(bounds_of(index)._rests.rows) == 0


def test_the_quiet_groups_hold_little() -> None:
    index = QuantizedIndex(DIM, IndexConfig(bits=2))
    index.add(X)
    assert index._core is not None
    codec = index._core.codec
    bounds = bounds_of(index)
    quiet = codec.groups[bounds._lead][1].start
    share = (codec.code.step[quiet:] ** 2).sum() / (codec.code.step**2).sum()
    assert share <= MAX_REST + 1e-6
    packed, specs = index._core.rows.coded(slice(None)).packed, bounds._specs
    again = rests_of(packed, specs, bounds._steps, bounds._lead)
    assert torch.equal(again, bounds.of(index._core.rows).rests)  # type: ignore[union-attr]
