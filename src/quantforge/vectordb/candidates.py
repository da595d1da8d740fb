"""How many candidates the true order needs: from scores and their standard errors.

Given score s_i and standard error e_i, the true score of row i is taken as normal, and

    p_i(t) = Phi((s_i - t) / e_i)           the probability that row i lies above t
    sum of p_i(t) over all rows = k         fixes t, the border of the true k best
    recall(m) = sum over the m best of p_i(t) / k

so the smallest m whose recall is the one asked for is a first answer, for each query its own: many
where scores lie close together, few where they do not.

Standard errors are those of any row. Rows near to a query also share with it what a code leaves
out, so their errors are larger, the more the fewer bits there are. Hence the exact scores x_i of
these candidates are looked at, which tell how much larger, and where the border is at least:

    z_i = (x_i - s_i) / e_i                    T = the k-th best x_i
    b = mean of z_i behind the k best, at most 0: a row is there for a score that is too good, too
    c^2 = mean of (z_i - b)^2, at least 1, where the k with the best x_i count as much as all
    lost(m) = sum of Phi((s_i + b e_i - T) / (c e_i)) over the rows behind the m best

and more are taken until lost(m) / k is what may be lost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

POOL = 16
"""Rows looked at first, times k."""
PRIOR = 8
"""Candidates with errors as expected that count beside those of a query."""
STEPS = 24
"""Halvings of the interval that holds the border."""
ROUNDING = 1e-5
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


def enough_behind(
    scores: torch.Tensor, errors: torch.Tensor, exact: torch.Tensor, k: int, recall: float
) -> torch.Tensor:
    """Return how many candidates (q,) lose no more of the true k best than they may.

    Args:
        scores: (q, m) falling, -inf where there is no row.
        errors: (q, m) standard errors.
        exact: (q, m) exact scores of the candidates so far, -inf for others.
        k: rows wanted.
        recall: expected share of the true k best among the candidates.
    """
    seen, there = exact.isfinite(), scores.isfinite()
    errors = errors.clamp_min(torch.finfo(errors.dtype).tiny)
    # exact scores of codes without error are off by rounding alone
    counts = seen & ((exact - scores).abs() > ROUNDING * scores.abs())
    off = torch.where(counts, (exact - scores) / errors, 0.0)
    last = seen & (torch.arange(scores.shape[1]) >= k)
    less = (off * last).sum(1, keepdim=True) / (last.sum(1, keepdim=True) + PRIOR)
    less = less.clamp_max(0)
    squares = torch.where(counts, off - less, 0.0).square()
    best = exact.topk(min(k, exact.shape[1]), dim=1)
    near = (squares.gather(1, best.indices).sum(1, keepdim=True) + PRIOR) / (k + PRIOR)
    larger = (squares.sum(1, keepdim=True) + PRIOR) / (seen.sum(1, keepdim=True) + PRIOR)
    larger = ((larger + near) / 2).clamp_min(1).sqrt()
    z = (scores + less * errors - best.values[:, -1:]) / (errors * larger)
    lost = torch.special.ndtr(z) * (there & ~seen)
    behind = lost.flip(1).cumsum(1).flip(1)
    return (behind > (1 - recall) * k).sum(1).maximum(seen.sum(1))


def choose(
    best: Best,
    errors_of: Callable[[torch.Tensor], torch.Tensor],
    exact_of: Callable[[torch.Tensor], torch.Tensor],
    n: int,
    k: int,
    recall: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return exact scores and rows (q, m) of candidates, -inf and -1 beyond those of a query.

    Args:
        best: searches by the codes.
        errors_of: returns standard errors (q, m) of rows (q, m).
        exact_of: returns exact scores (q, m) of rows (q, m), -inf where the row is -1.
        n: rows that may be found.
        k: rows wanted.
        recall: expected share of the true k best among the candidates, below 1.
    """
    pool = min(n, POOL * k)
    scores, rows = best(pool)
    errors, exact = errors_of(rows), torch.full_like(scores, -torch.inf)
    count = enough(chances(scores, errors, k), k, recall)
    while len(scores):
        # what lies beyond the pool counts too: it must be far from the candidates that suffice
        if pool < n and int(count.max()) > pool // 2:
            pool = min(n, 2 * pool)
            scores, rows = best(pool)
            errors = errors_of(rows)
            exact = torch.nn.functional.pad(exact, (0, pool - exact.shape[1]), value=-torch.inf)
            if not bool(exact.isfinite().any()):
                count = enough(chances(scores, errors, k), k, recall)
                continue
        asked = (torch.arange(pool) < count[:, None]) & ~exact.isfinite()
        width = int(count.max())
        new = exact_of(rows[:, :width].masked_fill(~asked[:, :width], -1))
        exact[:, :width] = exact[:, :width].maximum(new)
        count = enough_behind(scores, errors, exact, k, recall)
        if bool((count <= exact.isfinite().sum(1)).all()):
            break
    found = exact.isfinite()
    width = max(k, int(found.sum(1).max())) if len(found) else k
    return exact[:, :width], rows.masked_fill(~found, -1)[:, :width]
