"""Native mixed search on every level: the rows and scores of the oracle, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

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
