"""Native mixed search on every level: the rows and scores of the oracle, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops.test_mixed_search import GROUPS, Case, check


@pytest.mark.parametrize("groups", [*GROUPS, *(((bits, 40),) for bits in range(1, 9))])
@pytest.mark.parametrize(("n", "q"), [(1, 1), (100, 1), (333, 6)])
def test_against_oracle(n: int, q: int, groups: tuple, level: str) -> None:
    case = Case(groups, n, q)
    check(case, 4, impl="native")
    check(case, 30, np.arange(n) % 5 != 0, impl="native")


@pytest.mark.parametrize("q", [1, 9])
def test_bounds_change_nothing(q: int, level: str) -> None:
    case = Case(GROUPS[1], 700, q)
    for lead in (1, 3, 6):
        check(case, 5, bounds=case.bounds(lead), impl="native")


@pytest.mark.parametrize("n", [512, 3001])
@pytest.mark.parametrize("q", [1, 3])
def test_rows_in_the_order_of_their_scores_are_all_seen(q: int, n: int, level: str) -> None:
    """Tiles are visited out of order, and rows that may be good are finished a few at a time."""
    case = Case(GROUPS[1], n, q)
    case.offsets[:] = torch.linspace(-4, 4, n).half()
    for lead in (2, 6):
        check(case, 7, bounds=case.bounds(lead), impl="native")
    case.offsets[:] = 0.25
    case.packed = tuple(part[:1].repeat(n, 1) for part in case.packed)
    case.codes = [part[:1].repeat(n, 0) for part in case.codes]
    case.scales[:] = 1  # all are equal: the first rows are found
    check(case, 20, bounds=case.bounds(2), impl="native")
