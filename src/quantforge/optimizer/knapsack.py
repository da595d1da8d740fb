"""Bits for each slot of a model: the exact optimum of a separable loss under a budget of bytes.

    minimize    sum over slots s of loss[s, choice_s]
    subject to  sum over slots s of cost[s, choice_s] <= budget

The usual table of a multiple-choice knapsack, kept sparse: after each slot only the sums of costs
that can occur, and of those only the ones that no cheaper sum matches in loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantforge.errors import ConfigError, InputError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def allocate(loss: Any, cost: Any, budget: int) -> tuple[int, ...]:
    """Choose one column in each row, so that the sum of losses is least within the budget.

    Of choices with the same loss the cheapest wins; the same input always gives the same choice.

    Args:
        loss: (slots, choices) finite numbers, accumulated in float64.
        cost: (slots, choices) integers from 0.
        budget: greatest sum of costs.

    Returns:
        The column of each row.

    Raises:
        InputError: for arrays that do not fit each other, NaN, infinity or negative costs.
        ConfigError: if the cheapest choices exceed the budget.

    Source: dynamic programming by lists, Kellerer, Pferschy and Pisinger, Knapsack Problems (2004),
        sections 3.4 and 11.5.
    Cost: O(slots * choices * sums that occur), at most budget + 1 of them.
    """
    losses, costs = _checked(loss, cost)
    if (least := int(costs.min(1).sum())) > budget:
        raise ConfigError(
            f"a budget of {budget} is less than the cheapest choices cost, {least}; raise it, or "
            "offer cheaper choices"
        )
    spent, total = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[I64, I64]] = []
    choices = losses.shape[1]
    for row_loss, row_cost in zip(losses, costs, strict=True):
        before = np.repeat(np.arange(len(spent)), choices)
        choice = np.tile(np.arange(choices), len(spent))
        new_spent, new_total = spent[before] + row_cost[choice], total[before] + row_loss[choice]
        kept = _undominated(new_spent, new_total, budget)
        spent, total = new_spent[kept], new_total[kept]
        trail.append((before[kept], choice[kept]))
    state, chosen = len(total) - 1, []
    for before, choice in reversed(trail):
        chosen.append(int(choice[state]))
        state = int(before[state])
    return tuple(reversed(chosen))


def _undominated(spent: I64, total: F64, budget: int) -> I64:
    """Return the states within budget whose loss is below that of all cheaper ones, by cost.

    States come in the order of their choices, so that ties go to the first.
    """
    order = np.lexsort((total, spent))
    order = order[spent[order] <= budget]
    ordered = total[order]
    least_before = np.minimum.accumulate(np.concatenate([[np.inf], ordered[:-1]]))
    return order[ordered < least_before]


def _checked(loss: Any, cost: Any) -> tuple[F64, I64]:
    losses, costs = np.asarray(loss, np.float64), np.asarray(cost)
    if losses.ndim != 2 or losses.shape != costs.shape or losses.size == 0:
        raise InputError(
            "loss and cost must be (slots, choices) alike, with at least one of each; got "
            f"{losses.shape} and {costs.shape}"
        )
    if not np.isfinite(losses).all():
        slot, choice = np.argwhere(~np.isfinite(losses))[0]
        raise InputError(f"loss must be finite; slot {slot}, choice {choice} is not")
    if costs.dtype.kind not in "iu" or (costs < 0).any():
        raise InputError(f"cost must be integers from 0; got {costs.dtype}, least {costs.min()}")
    return losses, costs.astype(np.int64)
