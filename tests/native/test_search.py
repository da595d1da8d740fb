"""Native search on every level: against the oracle, and the order of equal scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import UnsupportedError
from quantforge.ops import search
from quantforge.ops.search import eager
from quantforge.ops.search.reference import search as reference
from quantforge.spec import QuantSpec
from tests.helpers import gaussian, make_store, spec_of, to_float64


@pytest.mark.parametrize("dim", [63, 64, 384])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("queries", [1, 3, 33])
def test_against_oracle(queries: int, bits: int, dim: int, level: str) -> None:
    store = make_store(spec_of(dim, bits), 1001, statistic="shared")
    query = torch.from_numpy(gaussian(queries, dim, seed=11))
    got, rows = search(
        query, store.packed, store.scales, store.spec, 5, **store.statistics, impl="native"
    )
    statistics = (store.shift_array, store.equalizer_array)
    best, at = reference(to_float64(query), store.encoded, store.spec, 5, *statistics)
    np.testing.assert_allclose(to_float64(got), best, rtol=0, atol=3e-6 * np.abs(best).max())
    assert (rows.numpy() == at).mean() > 0.99  # near ties may swap


@pytest.mark.parametrize("queries", [1, 2, 3, 40])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_equal_scores_are_ordered_by_row(
    bits: int, queries: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's score does not depend on its place: in a tile, in a group, in the ragged end."""
    monkeypatch.setitem(eager.TILE_SCORES, "cpu", 512 * queries)
    one = make_store(QuantSpec(96, bits), 7)
    packed, scales = one.packed.repeat(301, 1), one.scales.repeat(301, 1)
    query = torch.from_numpy(gaussian(queries, 96, seed=11))
    best = np.argsort(-(to_float64(query) @ one.exact.T), axis=1)
    for k in (3, 310):
        _, rows = search(query, packed, scales, one.spec, k, impl="native")
        expected = (best[:, :2, None] + 7 * np.arange(301)).reshape(queries, -1)[:, :k]
        np.testing.assert_array_equal(rows.numpy(), expected)


def test_no_residual(level: str) -> None:
    store = make_store(QuantSpec(64, 4, estimator="prod"), 5)
    with pytest.raises(UnsupportedError, match="QJL"):
        search(torch.ones(1, 64), store.packed, store.scales, store.spec, 2, impl="native")
