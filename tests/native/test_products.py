"""Native scores, sums and attention against the float64 oracles on every level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantforge.ops import attention, combine, scores
from quantforge.ops.attention import eager as eager_attention
from quantforge.ops.attention.api import Packed
from quantforge.ops.combine import eager as eager_combine
from quantforge.ops.scores import eager as eager_scores
from quantforge.spec import QuantSpec
from tests.helpers import (
    LAYOUTS,
    ODD_SIZES,
    Statistic,
    Store,
    gaussian,
    make_store,
    spec_of,
    threads,
    to_float64,
)

DIMS = (1, 63, 64, 96, 100, 128, 384)
EXACT, FAST = 1e-6, 1e-2


def _error(got: torch.Tensor, exact: np.ndarray) -> float:
    """Return the relative error in the Frobenius norm."""
    assert tuple(got.shape) == exact.shape
    return float(np.linalg.norm(to_float64(got) - exact) / max(np.linalg.norm(exact), 1e-30))


def _scores(query: torch.Tensor, store: Store, **options: Any) -> torch.Tensor:
    return scores(
        query, store.packed, store.scales, store.spec, **store.statistics, impl="native", **options
    )


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("queries", [1, 2, 3, 7, 33])
def test_scores(queries: int, bits: int, dim: int, level: str) -> None:
    store = make_store(spec_of(dim, bits), 127)
    query = torch.from_numpy(gaussian(queries, dim, seed=5))
    exact = to_float64(query) @ store.exact.T
    assert _error(_scores(query, store), exact) < EXACT
    assert _error(_scores(query, store, precision="fast"), exact) < FAST


@pytest.mark.parametrize("n", ODD_SIZES)
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_score_sizes(statistic: Statistic, n: int, level: str) -> None:
    store = make_store(QuantSpec(96, 4), 2, n, statistic=statistic)
    query = torch.from_numpy(gaussian(2, 5, 96, seed=5))
    exact = to_float64(query) @ np.swapaxes(store.exact, -1, -2)
    assert _error(_scores(query, store), exact) < EXACT
    assert _error(_scores(query, store, precision="fast"), exact) < FAST


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_fast_is_fast(bits: int, level: str) -> None:
    """Its results differ from the exact ones, so integers were multiplied."""
    store = make_store(QuantSpec(384, bits), 500)
    query = torch.from_numpy(gaussian(32, 384, seed=5))
    difference = _error(_scores(query, store, precision="fast"), to_float64(_scores(query, store)))
    assert 1e-5 < difference < FAST


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_wide_scales(precision: str, level: str) -> None:
    store = make_store(QuantSpec(64, 4, scale_dtype="float32"), 40, magnitude=1e6)
    query = torch.from_numpy(gaussian(3, 64, seed=5))
    exact = to_float64(query) @ store.exact.T
    assert _error(_scores(query, store, precision=precision), exact) < FAST


@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_score_layouts(layout: str, bits: int, level: str) -> None:
    store = make_store(QuantSpec(64, bits), 2, 50)
    query = torch.from_numpy(gaussian(2, 7, 64, seed=5))
    exact = to_float64(query) @ np.swapaxes(store.exact, -1, -2)
    arrange = LAYOUTS[layout]
    operands = (arrange(query), arrange(store.packed), arrange(store.scales), store.spec)
    assert _error(scores(*operands, impl="native"), exact) < EXACT
    assert _error(scores(*operands, precision="fast", impl="native"), exact) < FAST


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_scores_that_are_not_finite(precision: str, level: str) -> None:
    """NaN and infinity where eager torch has them: in their rows and queries, nowhere else."""
    store = make_store(QuantSpec(64, 4), 100)
    scales = store.scales.clone()
    scales[3], scales[60], scales[99] = torch.nan, torch.inf, -torch.inf
    query = torch.from_numpy(gaussian(5, 64, seed=5))
    query[1, 7], query[2, 0] = torch.nan, torch.inf
    arguments = (query, store.packed, scales)
    got = scores(*arguments, store.spec, precision=precision, impl="native")  # type: ignore[arg-type]
    want = eager_scores.scores(*arguments, None, None, store.spec.key)
    assert torch.equal(got.isnan()[[0, 1, 3, 4]], want.isnan()[[0, 1, 3, 4]])
    assert not got[2].isfinite().any()  # infinity, or NaN where infinities of both signs met
    rows = [0, 3, 4]
    assert torch.equal(got[rows].isfinite(), want[rows].isfinite())
    infinite = want[rows].isinf()
    assert torch.equal(got[rows][infinite], want[rows][infinite])


@pytest.mark.parametrize("count", [1, 2])
def test_threads(count: int, level: str) -> None:
    """Results do not depend on threads where work is not split, and hardly where it is."""
    store = make_store(QuantSpec(128, 4), 2, 9001, statistic="per_head")
    query = torch.from_numpy(gaussian(2, 3, 128, seed=5))
    weights = torch.from_numpy(gaussian(2, 3, 9001, seed=6))
    with threads(count):
        got = _scores(query, store)
        total = combine(
            weights, store.packed, store.scales, store.spec, **store.statistics, impl="native"
        )
        operand = Packed(store.packed.unsqueeze(0), store.scales.unsqueeze(0), store.spec)
        out, lse = attention(query.unsqueeze(0), operand, operand, impl="native")
    assert _error(got, to_float64(query) @ np.swapaxes(store.exact, -1, -2)) < EXACT
    assert _error(total, to_float64(weights) @ store.exact) < 3 * EXACT
    arguments = (operand.packed, operand.scales, None, None)
    want = eager_attention.attention(
        query.unsqueeze(0), *arguments, *arguments, None, False, 128**-0.5, *[store.spec.key] * 2
    )
    torch.testing.assert_close((out, lse), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_combine(queries: int, bits: int, dim: int, level: str) -> None:
    store = make_store(spec_of(dim, bits), 127, statistic="shared")
    weights = torch.from_numpy(gaussian(queries, 127, seed=5))
    got = combine(
        weights, store.packed, store.scales, store.spec, **store.statistics, impl="native"
    )
    assert _error(got, to_float64(weights) @ store.exact) < 3 * EXACT


@pytest.mark.parametrize("n", ODD_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_combine_sizes_and_layouts(layout: str, n: int, level: str) -> None:
    store = make_store(QuantSpec(80, 3), 2, n)
    weights = torch.from_numpy(gaussian(2, 7, n, seed=5))
    operands = [LAYOUTS[layout](t) for t in (weights, store.packed, store.scales)]
    got = combine(*operands, store.spec, impl="native")
    assert _error(got, to_float64(weights) @ store.exact) < 3 * EXACT


def test_combine_of_scales_that_are_not_finite(level: str) -> None:
    store = make_store(QuantSpec(64, 4), 100)
    scales = store.scales.clone()
    scales[60] = torch.nan
    weights = torch.from_numpy(gaussian(3, 100, seed=5))
    weights[1, 60] = 0
    got = combine(weights, store.packed, scales, store.spec, impl="native")
    want = eager_combine.combine(weights, store.packed, scales, None, None, store.spec.key)
    assert torch.equal(got.isnan(), want.isnan())
    assert got.isnan().all()


ATTENTION = (
    # key spec, value spec, (B, Hq, Hkv, q, n)
    (QuantSpec(64, 4), QuantSpec(64, 4), (1, 4, 2, 1, 1)),
    (QuantSpec(64, 1), QuantSpec(128, 2), (2, 6, 2, 3, 63)),
    (QuantSpec(128, 3), QuantSpec(64, 5), (1, 4, 1, 17, 127)),
    (QuantSpec(96, 6), QuantSpec(80, 7), (1, 2, 2, 40, 100)),
    (QuantSpec(192, 8), QuantSpec(128, 8, scale_dtype="float32"), (2, 8, 1, 5, 100)),
    (QuantSpec(100, 4, rotation="qr"), QuantSpec(96, 1), (1, 3, 3, 2, 127)),
    (QuantSpec(128, 4), QuantSpec(128, 4), (1, 8, 2, 1, 3000)),
)


def _attend(
    query: torch.Tensor,
    key: Store,
    value: Store,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return native attention and eager torch's."""
    operands = [Packed(s.packed, s.scales, s.spec, **s.statistics) for s in (key, value)]
    got = attention(query, *operands, mask=mask, is_causal=is_causal, impl="native")
    want = attention(query, *operands, mask=mask, is_causal=is_causal, impl="eager")
    return got, want


@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("masked", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: f"{case[0].dim}-{case[0].bits}")
def test_attention(case: tuple, masked: str, statistic: Statistic, level: str) -> None:
    k_spec, v_spec, (batch, heads, kv_heads, length, n) = case
    key = make_store(k_spec, batch, kv_heads, n, statistic=statistic)
    value = make_store(v_spec, batch, kv_heads, n, statistic=statistic, seed=3)
    query = torch.from_numpy(gaussian(batch, heads, length, k_spec.dim, seed=5))
    mask = None
    if masked == "bool":
        mask = torch.from_numpy(gaussian(batch, 1, length, n, seed=6) > 0)
        mask[0, 0, 0] = False  # sees nothing
    elif masked == "float":
        mask = torch.from_numpy(gaussian(heads, 1, n, seed=6))
    got, want = _attend(query, key, value, mask, is_causal=masked == "causal")
    torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-5)
    assert _error(got[0], to_float64(want[0])) < 5e-6
    if masked == "bool":
        assert (got[0][0, :, 0] == 0).all()
        assert (got[1][0, :, 0] == -torch.inf).all()


def test_attention_to_nothing(level: str) -> None:
    store = make_store(QuantSpec(64, 4), 1, 2, 0)
    query = torch.from_numpy(gaussian(1, 4, 3, 64))
    (out, lse), _ = _attend(query, store, store)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_attention_with_numbers_that_are_not_finite(bad: float, level: str) -> None:
    key = make_store(QuantSpec(64, 4), 1, 1, 200)
    key.scales[0, 0, 150] = bad
    query = torch.from_numpy(gaussian(1, 2, 3, 64, seed=5))
    got, want = _attend(query, key, make_store(QuantSpec(64, 4), 1, 1, 200, seed=3))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    mask = torch.ones(200, dtype=torch.bool)
    mask[150] = False
    got, want = _attend(query, key, make_store(QuantSpec(64, 4), 1, 1, 200, seed=3), mask)
    assert got[0].isfinite().all()
    torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_attention_layouts(layout: str, level: str) -> None:
    store = make_store(QuantSpec(64, 3), 2, 2, 50, statistic="per_head")
    query = torch.from_numpy(gaussian(2, 4, 7, 64, seed=5))
    mask = torch.from_numpy(gaussian(2, 4, 7, 50, seed=6))
    arrange = LAYOUTS[layout]
    plain = Packed(store.packed, store.scales, store.spec, **store.statistics)
    moved = plain._replace(packed=arrange(store.packed), scales=arrange(store.scales))
    got = attention(arrange(query), moved, moved, mask=arrange(mask), impl="native")
    want = attention(query, plain, plain, mask=mask, impl="eager")
    torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-5)
