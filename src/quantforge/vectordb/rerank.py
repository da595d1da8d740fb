"""The best of candidates by the vectors themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from quantforge.ops.search.eager import keys_of, results_of

Fetch = Callable[[np.ndarray], Any]
"""Returns the vectors (m, dim) of ids (m,)."""


def rerank_by(
    vectors_of: Callable[[torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    *,
    squared: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k best (q, k) of candidates and their rows, by exact scores.

    Args:
        vectors_of: returns float32 vectors (m, dim) of distinct rows (m,).
        query: (q, dim).
        rows: (q, m) candidates, -1 where there is none.
        k: how many to keep.
        squared: scores are negative squared distances instead of inner products.
    """
    distinct, where = rows.clamp_min(0).unique(return_inverse=True)
    x = vectors_of(distinct)
    found = query.new_empty(rows.shape)
    for i, candidates in enumerate(where):
        if squared:
            found[i] = -(x[candidates] - query[i]).square().sum(-1)
        else:
            found[i] = x[candidates] @ query[i]
    found.masked_fill_(rows < 0, -torch.inf)
    return results_of(keys_of(found, rows.clamp_min(0)).topk(k, dim=1).values, None)
