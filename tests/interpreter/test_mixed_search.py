"""The kernels of `mixed_search` on the CPU, by Triton's interpreter: bit for bit the oracle's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.ops import mixed_search
from quantforge.ops.mixed_search.parts import Visits
from tests.interpreter import INTERPRET
from tests.ops.test_mixed_search import GROUPS, Case, check

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("n", "q", "k"), [(1, 1, 1), (70, 2, 2)])
def test_against_oracle(n: int, q: int, k: int, groups: tuple) -> None:
    case = Case(groups, n, q)
    check(case, k, impl="triton")


def test_filter() -> None:
    case = Case(GROUPS[0], 100, 2)
    check(case, 4, np.arange(100) % 3 == 0, impl="triton")
    check(case, 2, np.arange(100) == 17, impl="triton")


def test_visits() -> None:
    """Ranges of unequal lengths, also empty ones, visited by some, out of order."""
    case = Case(GROUPS[0], 120, 4)
    query, packed, specs, scales, offsets, _ = case.arguments
    ranges = torch.tensor([[70, 120], [0, 37], [37, 37], [40, 41]])
    starts = torch.tensor([0, 2, 5, 6, 8])
    who = torch.tensor([0, 2, 0, 1, 3, 1, 2, 3])
    bases = torch.linspace(-1, 1, 8)
    visits = Visits(ranges, starts, who)
    arguments = (query, packed, specs, scales, offsets, bases, 4)
    found = mixed_search(*arguments, visits=visits, impl="triton")
    expected = mixed_search(*arguments, visits=visits, impl="eager")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_equal_scores_are_ordered_by_row() -> None:
    case = Case(GROUPS[0], 100, 2)
    packed = tuple(part[:1].repeat(100, 1) for part in case.packed)
    same = (case.scales[:1].repeat(100, 1), case.offsets[:1].repeat(100))
    _, rows = mixed_search(case.query, packed, case.specs, *same, case.base, 4, impl="triton")
    assert torch.equal(rows, torch.arange(4).expand(2, 4))


@pytest.mark.parametrize("seed", range(4))
def test_visits_of_any_kind(seed: int) -> None:
    """Ranges may be empty, without visitors, or out of order; queries may look at nothing."""
    random = np.random.RandomState(seed)
    n, q, count = random.randint(1, 120), random.randint(1, 6), random.randint(1, 12)
    query, packed, specs, scales, offsets, _ = Case(((4, 32),), n, q).arguments
    cuts = np.sort(random.randint(0, n + 1, count - 1))
    ranges = np.stack([np.r_[0, cuts], np.r_[cuts, n]], 1)[random.permutation(count)]
    which, who = np.nonzero(random.random_sample((count, q)) < (0, 0.15, 0.5, 0.1)[seed])
    starts = torch.from_numpy(np.searchsorted(which, np.arange(count + 1)))
    visits = Visits(torch.from_numpy(ranges), starts, torch.from_numpy(who))
    base = torch.from_numpy(random.randn(len(who)).astype(np.float32))
    rows = (query, packed, specs, scales, offsets, base, 5)
    found = mixed_search(*rows, visits=visits, impl="triton")
    expected = mixed_search(*rows, visits=visits, impl="eager")
    assert all(map(torch.equal, found, expected))
