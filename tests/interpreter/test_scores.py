"""The kernels of `scores` on the CPU, by Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import UnsupportedError
from quantforge.ops import scores
from quantforge.ops.scores.reference import scores as reference
from quantforge.spec import QuantSpec
from tests.helpers import (
    FORMS,
    Statistic,
    Store,
    assert_close,
    gaussian,
    make_store,
    misaligned,
    naive_scores,
    scattered,
    spec_of,
    to_float64,
    transposed,
)
from tests.interpreter import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")


def _check(query: torch.Tensor, store: Store, **layout: torch.Tensor) -> torch.Tensor:
    packed = layout.get("packed", store.packed)
    scales = layout.get("scales", store.scales)
    got = scores(query, packed, scales, store.spec, **store.statistics, impl="triton")
    assert got.dtype == query.dtype
    exact = reference(
        to_float64(query), store.encoded, store.spec, store.shift_array, store.equalizer_array
    )
    assert_close(got, [naive_scores(query, store, form) for form in FORMS], exact)
    return got


def _query(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(gaussian(*shape, seed=11)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 96, 100, 128, 384])
@pytest.mark.parametrize("bits", range(1, 9))
def test_few_queries(bits: int, dim: int, dtype: torch.dtype) -> None:
    _check(_query(3, dim, dtype=dtype), make_store(spec_of(dim, bits), 37))


@pytest.mark.parametrize(
    ("bits", "dim", "dtype"),
    [(2, 256, torch.float16), (3, 512, torch.float16), (4, 128, torch.float32)],
)
def test_whole_rows(
    bits: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows enough to need no splits, in programs of two tiles, the last one ragged."""
    from quantforge.ops.kernels import score

    monkeypatch.setattr(score, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(score, "WAVES", 1)
    monkeypatch.setattr(score, "WARPS", 4)
    called = []
    kernel = score.whole_row_products

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]):  # type: ignore[no-untyped-def]
            called.append(grid)
            return kernel[grid]

    monkeypatch.setattr(score, "whole_row_products", Spy())
    _check(_query(2, dim, dtype=dtype), make_store(spec_of(dim, bits), 230, statistic="shared"))
    assert called == [(8, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "dim"), [(2, 64), (3, 128), (4, 96), (5, 80), (7, 127), (8, 64)])
def test_many_queries(bits: int, dim: int, dtype: torch.dtype) -> None:
    _check(_query(19, dim, dtype=dtype), make_store(spec_of(dim, bits), 70))


@pytest.mark.parametrize("q", [1, 2, 4, 5, 8])
def test_query_tiles(q: int) -> None:
    for dtype in (torch.float16, torch.float32):
        _check(_query(q, 128, dtype=dtype), make_store(QuantSpec(128, 4), 33))


@pytest.mark.parametrize("dim", [1, 2, 12, 20, 63, 640, 1536])
def test_dims(dim: int) -> None:
    _check(_query(2, dim), make_store(spec_of(dim, 4), 5))


@pytest.mark.parametrize(
    ("query_lead", "lead"),
    [((2, 3), (2, 3)), ((), (2, 3)), ((2, 3), ()), ((2, 1), (1, 3)), ((3,), (2, 1)), ((0,), (0,))],
)
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_leading_axes(statistic: Statistic, lead: tuple, query_lead: tuple) -> None:
    _check(_query(*query_lead, 2, 64), make_store(QuantSpec(64, 4), *lead, 9, statistic=statistic))


@pytest.mark.parametrize(("q", "n"), [(0, 5), (5, 0), (0, 0)])
def test_empty(q: int, n: int) -> None:
    assert _check(_query(q, 64), make_store(QuantSpec(64, 4), n)).shape == (q, n)


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("move", [scattered, misaligned])
@pytest.mark.usefixtures("poison")
def test_garbage_around_the_rows_is_not_read(move, bits: int) -> None:  # type: ignore[no-untyped-def]
    """Rows lie among 0xA5 and NaN; what `empty` returns is NaN."""
    store = make_store(QuantSpec(96, bits), 2, 21, statistic="per_head")
    for q in (2, 17):
        _check(move(_query(2, q, 96)), store, packed=move(store.packed), scales=move(store.scales))


def test_zero_query() -> None:
    store = make_store(QuantSpec(64, 4), 5)
    for dtype in (torch.float16, torch.float32):
        got = scores(
            torch.zeros(2, 64, dtype=dtype), store.packed, store.scales, store.spec, impl="triton"
        )
        assert torch.equal(got, torch.zeros(2, 5, dtype=dtype))


def test_integer_sums_are_exact() -> None:
    """One scale and centroids that are digits: the score is a sum of integers, without error."""
    store = make_store(QuantSpec(128, 1), 20)
    query = torch.from_numpy(np.random.RandomState(0).randint(-9, 10, (3, 128)).astype(np.float32))
    got = _check(query, store)
    assert got.dtype == torch.float32


def test_reasons() -> None:
    store = make_store(QuantSpec(64, 4, estimator="prod"), 5)
    with pytest.raises(UnsupportedError, match="QJL"):
        scores(_query(1, 64), store.packed, store.scales, store.spec, impl="triton")
    store = make_store(QuantSpec(64, 4), 5)
    with pytest.raises(UnsupportedError, match="not adjacent"):
        scores(_query(1, 64), transposed(store.packed), store.scales, store.spec, impl="triton")
    with pytest.raises(UnsupportedError, match="bfloat16"):
        scores(_query(1, 64).bfloat16(), store.packed, store.scales, store.spec, impl="triton")
