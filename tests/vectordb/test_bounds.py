"""Lengths of rows follow them, and a search with them finds what one without them finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.ops.mixed_search.parts import rests_of
from quantforge.vectordb import IndexConfig, QuantizedIndex
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
    again, same = index.search(Q, 10)
    np.testing.assert_array_equal(ids, again)
    np.testing.assert_array_equal(scores, same)


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
