"""The best of candidates by the vectors themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from quantforge.ops.search.eager import keys_of, results_of

Fetch = Callable[[np.ndarray], Any]
"""Returns the vectors (m, dim) of ids (m,)."""


def best_of(exact: torch.Tensor, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k best of exact scores (q, m) and their rows; equal ones by rising row."""
    return results_of(keys_of(exact, rows.clamp_min(0)).topk(k, dim=1).values, None)


def exact_scores(
    vectors_of: Callable[[torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    rows: torch.Tensor,
    *,
    squared: bool,
) -> torch.Tensor:
    """Return the exact scores (q, m) of rows.

    Args:
        vectors_of: returns float32 vectors (m, dim) of distinct rows (m,).
        query: (q, dim).
        rows: (q, m) candidates; -1, of score -inf, where there is none.
        squared: scores are negative squared distances instead of inner products.
    """
    there = rows >= 0
    found = query.new_full(rows.shape, -torch.inf)
    if not bool(there.any()):
        return found
    distinct, place = rows[there].unique(return_inverse=True)
    x = vectors_of(distinct)
    for i, own in enumerate(place.split(there.sum(1).tolist())):
        if squared:
            found[i, there[i]] = -(x[own] - query[i]).square().sum(-1)
        else:
            found[i, there[i]] = x[own] @ query[i]
    return found
