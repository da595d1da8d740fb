"""The kernels of `search` on the CPU, by Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest

from quantforge.errors import UnsupportedError
from quantforge.ops import search
from quantforge.spec import QuantSpec
from tests.helpers import CPU, make_store, misaligned, scattered, spec_of, to_float64
from tests.interpreter import INTERPRET
from tests.ops.test_search import check_search, query_of

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")


@pytest.mark.parametrize(("bits", "dim"), [(3, 64), (4, 80), (5, 63)])
@pytest.mark.parametrize("q", [1, 9])
def test_against_oracle(q: int, bits: int, dim: int) -> None:
    store = make_store(spec_of(dim, bits), 200)
    check_search(query_of(q, dim, device=CPU), store, 3, impl="triton")


@pytest.mark.parametrize(("bits", "dim"), [(1, 512), (2, 256), (3, 512), (4, 128)])
def test_whole_rows(bits: int, dim: int) -> None:
    store = make_store(spec_of(dim, bits), 150, statistic="shared")
    allowed = np.random.RandomState(3).random_sample(150) < 0.6
    check_search(query_of(3, dim, device=CPU), store, 3, allowed, impl="triton")


@pytest.mark.parametrize("q", [1, 9])
@pytest.mark.parametrize("n", [0, 1, 63])
def test_sizes(q: int, n: int) -> None:
    store = make_store(QuantSpec(64, 4), n, statistic="shared")
    check_search(query_of(q, 64, device=CPU), store, 5, impl="triton")


@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("q", [1, 9])
def test_filter(q: int, share: float) -> None:
    store = make_store(QuantSpec(64, 4), 301)
    allowed = np.random.RandomState(3).random_sample(301) < share
    check_search(query_of(q, 64, device=CPU), store, 7, allowed, impl="triton")


@pytest.mark.parametrize(("q", "copies"), [(1, 60), (9, 12)])
def test_equal_scores_are_ordered_by_row(q: int, copies: int) -> None:
    """Many queries with fewer copies than groups: numpy's matmul rounds equal rows unequally."""
    one = make_store(QuantSpec(64, 4), 10)
    packed, scales = one.packed.repeat(copies, 1), one.scales.repeat(copies, 1)
    query = query_of(q, 64, device=CPU)
    _, rows = search(query, packed, scales, one.spec, 10, impl="triton")
    best = np.argsort(-(to_float64(query) @ one.exact.T), axis=1)[:, :1]
    np.testing.assert_array_equal(rows.numpy(), best + 10 * np.arange(10))


@pytest.mark.parametrize("move", [scattered, misaligned])
@pytest.mark.usefixtures("poison")
def test_garbage_around_the_rows_is_not_read(move) -> None:  # type: ignore[no-untyped-def]
    store = make_store(QuantSpec(96, 3), 90, statistic="shared")
    for q in (1, 9):
        check_search(
            move(query_of(q, 96, device=CPU)),
            store,
            4,
            impl="triton",
            packed=move(store.packed),
            scales=move(store.scales),
        )


def test_many_groups_and_a_large_k() -> None:
    """More groups than one program selects from, and more keys than one program sorts."""
    store = make_store(QuantSpec(64, 2), 4200)
    check_search(query_of(1, 64, device=CPU), store, 12, impl="triton")


def test_reasons() -> None:
    store = make_store(QuantSpec(64, 4), 5)
    with pytest.raises(UnsupportedError, match="k = 201 is more than 200"):
        search(
            query_of(1, 64, device=CPU), store.packed, store.scales, store.spec, 201, impl="triton"
        )
