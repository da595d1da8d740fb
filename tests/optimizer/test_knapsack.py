"""Allocation against every combination, and what must hold of any."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantforge.errors import ConfigError, InputError
from quantforge.optimizer import allocate


def total(table: np.ndarray, chosen: tuple[int, ...]) -> float:
    """Sum in the order of rows, as the program does, so that equal sums are equal."""
    amount = 0.0
    for row, column in zip(np.asarray(table, np.float64), chosen, strict=True):
        amount += row[column]
    return float(amount)


def by_trying_all(loss: np.ndarray, cost: np.ndarray, budget: int) -> tuple[float, float]:
    """Return the least loss within the budget, and the least cost that has it."""
    every = product(range(loss.shape[1]), repeat=len(loss))
    within = [c for c in every if total(cost, c) <= budget]
    return min((total(loss, c), total(cost, c)) for c in within)


@st.composite
def problems(draw: st.DrawFn, max_slots: int = 5) -> tuple[np.ndarray, np.ndarray, int]:
    shape = (draw(st.integers(1, max_slots)), draw(st.integers(1, 4)))
    # few distinct values: ties are what goes wrong
    losses = st.one_of(st.integers(0, 4).map(float), st.floats(0, 10, width=32))
    loss = draw(arrays(np.float64, shape, elements=losses))
    cost = draw(arrays(np.int64, shape, elements=st.integers(0, 12)))
    least, most = int(cost.min(1).sum()), int(cost.max(1).sum())
    return loss, cost, draw(st.integers(least, most + 2))


@settings(max_examples=100, deadline=None)
@given(problems())
def test_no_combination_is_better(problem: tuple[np.ndarray, np.ndarray, int]) -> None:
    loss, cost, budget = problem
    chosen = allocate(loss, cost, budget)
    assert (total(loss, chosen), total(cost, chosen)) == by_trying_all(loss, cost, budget)


@settings(max_examples=40, deadline=None)
@given(problems(max_slots=20))
def test_never_over_budget_and_more_budget_never_loses_more(
    problem: tuple[np.ndarray, np.ndarray, int],
) -> None:
    loss, cost, budget = problem
    before = np.inf
    for more in (budget, budget + 1, budget + 5, budget + 50):
        chosen = allocate(loss, cost, more)
        assert total(cost, chosen) <= more
        assert total(loss, chosen) <= before
        before = total(loss, chosen)
        assert allocate(loss, cost, more) == chosen


@settings(max_examples=40, deadline=None)
@given(problems())
def test_another_choice_never_hurts(problem: tuple[np.ndarray, np.ndarray, int]) -> None:
    loss, cost, budget = problem
    fewer = allocate(loss, cost, budget)
    more = allocate(np.hstack([loss, loss[:, :1] / 2]), np.hstack([cost, cost[:, :1] + 1]), budget)
    wider = np.hstack([loss, loss[:, :1] / 2])
    assert total(wider, more) <= total(loss, fewer)


def test_by_hand() -> None:
    loss = [[9.0, 1.0], [3.0, 2.0], [8.0, 0.0]]
    cost = [[1, 4], [1, 2], [1, 4]]
    assert allocate(loss, cost, 3) == (0, 0, 0)
    assert allocate(loss, cost, 6) in ((1, 0, 0), (0, 0, 1))  # equal losses
    assert allocate(loss, cost, 9) == (1, 0, 1)
    assert allocate(loss, cost, 10) == (1, 1, 1)


def test_equal_losses_take_the_cheaper_choice() -> None:
    assert allocate([[1.0, 1.0, 1.0]], [[3, 1, 2]], 9) == (1,)


def test_large_and_uneven() -> None:
    """80 layers with costs of a real model: exact, not a table of bytes."""
    random = np.random.RandomState(0)
    bits = np.array([1, 2, 3, 4, 6, 8])
    cost = np.repeat((8192 * 8 * (16 * bits + 2))[None], 160, 0)
    cost[::7] //= 4
    loss = random.uniform(0.1, 10, (160, 1)) * 4.0**-bits
    budget = int(cost[:, 2].sum())
    chosen = allocate(loss, cost, budget)
    assert cost[np.arange(160), chosen].sum() <= budget
    assert total(loss, chosen) < loss[:, 2].sum()
    # Lagrange's bound: no choice of any budget of these bytes can lose less
    bound = max(
        (loss + price * cost).min(1).sum() - price * budget
        for price in np.geomspace(1e-10, 1e-4, 200)
    )
    assert bound <= total(loss, chosen) <= bound + np.ptp(loss[:, 1:3], axis=1).max()


@pytest.mark.parametrize(
    ("loss", "cost", "error", "message"),
    [
        ([[1.0, 2.0]], [[5, 6]], ConfigError, "a budget of 4 is less than .* cost, 5"),
        ([[1.0, np.nan]], [[1, 2]], InputError, "slot 0, choice 1 is not"),
        ([[1.0]], [[1, 2]], InputError, r"got \(1, 1\) and \(1, 2\)"),
        ([1.0], [1], InputError, "slots, choices"),
        ([[1.0]], [[-1]], InputError, "integers from 0"),
        ([[1.0]], [[0.5]], InputError, "integers from 0; got float64"),
    ],
)
def test_refused(loss: list, cost: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        allocate(loss, cost, 4)
