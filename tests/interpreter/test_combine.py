"""The kernel of `combine` on the CPU, by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from quantforge.errors import UnsupportedError
from quantforge.ops import combine
from quantforge.ops.combine.reference import combine as reference
from quantforge.spec import QuantSpec
from tests.helpers import (
    FORMS,
    Statistic,
    Store,
    assert_close,
    gaussian,
    make_store,
    misaligned,
    naive_combine,
    scattered,
    spec_of,
    to_float64,
    transposed,
)
from tests.interpreter import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")


def _check(weights: torch.Tensor, store: Store, **layout: torch.Tensor) -> torch.Tensor:
    packed = layout.get("packed", store.packed)
    scales = layout.get("scales", store.scales)
    got = combine(weights, packed, scales, store.spec, **store.statistics, impl="triton")
    assert got.dtype == weights.dtype
    exact = reference(
        to_float64(weights), store.encoded, store.spec, store.shift_array, store.equalizer_array
    )
    assert_close(got, [naive_combine(weights, store, form) for form in FORMS], exact)
    return got


def _weights(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(gaussian(*shape, seed=12)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 96, 100])
@pytest.mark.parametrize("bits", range(1, 9))
def test_against_oracle(bits: int, dim: int, dtype: torch.dtype) -> None:
    _check(_weights(3, 37, dtype=dtype), make_store(spec_of(dim, bits), 37))


@pytest.mark.parametrize(("q", "n"), [(0, 5), (5, 0), (1, 1), (17, 63), (2, 1100)])
def test_sizes(q: int, n: int) -> None:
    _check(_weights(q, n), make_store(QuantSpec(64, 4), n, statistic="shared"))


@pytest.mark.parametrize(
    ("weights_lead", "lead"),
    [((2, 3), (2, 3)), ((), (2, 3)), ((2, 3), ()), ((2, 1), (1, 3)), ((3,), (2, 1)), ((0,), (0,))],
)
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_leading_axes(statistic: Statistic, lead: tuple, weights_lead: tuple) -> None:
    store = make_store(QuantSpec(64, 4), *lead, 9, statistic=statistic)
    _check(_weights(*weights_lead, 2, 9), store)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("move", [scattered, misaligned])
@pytest.mark.usefixtures("poison")
def test_garbage_around_the_rows_is_not_read(move, bits: int) -> None:  # type: ignore[no-untyped-def]
    store = make_store(QuantSpec(96, bits), 2, 21, statistic="per_head")
    packed, scales = move(store.packed), move(store.scales)
    _check(move(_weights(2, 3, 21)), store, packed=packed, scales=scales)


def test_reasons() -> None:
    store = make_store(QuantSpec(64, 4), 5)
    with pytest.raises(UnsupportedError, match="not adjacent"):
        combine(_weights(1, 5), transposed(store.packed), store.scales, store.spec, impl="triton")
