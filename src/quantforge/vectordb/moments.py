"""Moments of data that pass by once, in batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quantforge.errors import InputError
from quantforge.numerics.vectors import Moments


def measure(batches: Iterable[torch.Tensor], dim: int) -> Moments:
    """Return the moments of vectors that come as (n, dim) tensors.

    Sums are float64 about the mean of the first batch that has rows.

    Raises:
        InputError: if there are no vectors.

    Cost: one pass; dim^2 multiplications a vector.
    """
    n, fourth = 0, 0.0
    pivot = None
    total, outer = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    for batch in batches:
        if not len(batch):
            continue
        x = batch.to("cpu", torch.float64)
        pivot = x.mean(0) if pivot is None else pivot
        centred = x - pivot
        n += len(x)
        total += centred.sum(0)
        outer += centred.T @ centred
        fourth += float(centred.square().sum(1).square().sum())
    if pivot is None:
        raise InputError("train got no vectors; give at least 2")
    return Moments(n, pivot.numpy(), total.numpy(), outer.numpy(), fourth)
