"""How many candidates the true order needs: from scores and their standard errors.

Given score s_i and standard error e_i, the true score of row i is taken as normal, and

    p_i(t) = Phi((s_i - t) / e_i)           the probability that row i lies above t
    sum of p_i(t) over all rows = k         fixes t, the border of the true k best
    recall(m) = sum over the m best of p_i(t) / k

so the smallest m whose recall is the one asked for is the answer, for each query its own: many
where scores lie close together, few where they do not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

POOL = 16
"""Rows looked at first, times k."""
STEPS = 40
"""Halvings of the interval that holds the border."""
LEAST_ERROR = 1e-6
"""Times the spread of the scores: exact scores too must have a border between them."""

Best = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Returns the m best scores (q, m), falling, and their rows."""


def chances(scores: torch.Tensor, errors: torch.Tensor, k: int) -> torch.Tensor:
    """Return the probability (q, m) of each row to be among the true k best.

    Args:
        scores: (q, m) falling, -inf where there is no row.
        errors: (q, m) standard errors.
        k: at most m.
    """
    there = scores.isfinite()
    scores = torch.where(there, scores, 0.0)
    spread = scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True)
    errors = errors.maximum(LEAST_ERROR * spread + torch.finfo(errors.dtype).tiny)
    reach = 40 * errors.amax(1, keepdim=True)
    low = scores.amin(1, keepdim=True) - reach
    high = scores.amax(1, keepdim=True) + reach
    wanted = there.sum(1, keepdim=True).clamp_max(k).to(scores.dtype)

    def above(border: torch.Tensor) -> torch.Tensor:
        return torch.special.ndtr((scores - border) / errors) * there

    for _ in range(STEPS):
        middle = (low + high) / 2
        many = above(middle).sum(1, keepdim=True) > wanted
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    return above((low + high) / 2)


def enough(chance: torch.Tensor, k: int, recall: float) -> torch.Tensor:
    """Return how many candidates (q,) give the recall, at least k.

    Args:
        chance: (q, m) as `chances` returns it.
        k: rows wanted.
        recall: expected share of the true k best among the candidates.
    """
    share = chance.cumsum(1) / chance.sum(1, keepdim=True).clamp_min(1e-30)
    return ((share < recall).sum(1) + 1).clamp(min(k, chance.shape[1]), chance.shape[1])


def choose(
    best: Best,
    errors_of: Callable[[torch.Tensor], torch.Tensor],
    n: int,
    k: int,
    recall: float,
) -> torch.Tensor:
    """Return candidate rows (q, m) of each query, -1 beyond those that it needs.

    Args:
        best: searches by the codes.
        errors_of: returns standard errors (q, m) of rows (q, m).
        n: rows that may be found.
        k: rows wanted.
        recall: expected share of the true k best among the candidates, below 1.
    """
    pool = min(n, POOL * k)
    while True:
        scores, rows = best(pool)
        chance = chances(scores, errors_of(rows), k)
        count = enough(chance, k, recall)
        # what lies beyond the pool counts too: it must be far from the candidates that suffice
        if pool == n or int(count.max()) <= pool // 2:
            break
        pool = min(n, 2 * pool)
    width = int(count.max()) if len(count) else k
    beyond = torch.arange(width, device=rows.device) >= count[:, None]
    return rows[:, :width].masked_fill(beyond, -1)
