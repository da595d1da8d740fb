"""Shift and equalizer as operators see them: (dim,) or (..., 1, dim), one per set of vectors."""

from __future__ import annotations

import torch


def is_shared(t: torch.Tensor | None) -> bool:
    """Return whether all vectors share one statistic (or have none)."""
    return t is None or t.numel() == t.shape[-1]


def flatten(t: torch.Tensor | None) -> torch.Tensor | None:
    """Return a shared statistic as (dim,)."""
    return None if t is None else t.reshape(-1)


def equalize_query(query: torch.Tensor, equalizer: torch.Tensor | None) -> torch.Tensor:
    """Return a float32 query (..., q, dim) times the equalizer of the vectors it will meet."""
    query = query.to(torch.float32)
    return query if equalizer is None else query * equalizer.to(torch.float32)


def restore(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `weight * shift + equalizer * x` in float32; weight is 1 if None."""
    if equalizer is not None:
        x = x * equalizer.to(torch.float32)
    if shift is not None:
        x = x + (shift.to(torch.float32) if weight is None else weight * shift.to(torch.float32))
    return x
