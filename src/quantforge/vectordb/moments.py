"""Moments and a sample of data that pass by once, in batches."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from quantforge.errors import InputError
from quantforge.numerics.vectors import Moments

SAMPLE_BYTES, GPU_SAMPLE_BYTES = 1 << 28, 1 << 31
CHUNK_ROWS = 1 << 16
"""Vectors that are float64 at once."""


def measure(batches: Iterable[torch.Tensor], dim: int) -> Moments:
    """Return the moments of vectors that come as (n, dim) tensors.

    Sums are float64 about the mean of the first batch that has rows.

    Raises:
        InputError: if there are no vectors.

    Cost: one pass; dim^2 multiplications a vector.
    """
    return Passing(dim).see(batches).moments


class Passing:
    """What is kept of vectors that pass by.

    Args:
        dim: their length.
        rows: vectors of a uniform sample to keep; by default as many as fit SAMPLE_BYTES, or
            GPU_SAMPLE_BYTES where they come on a GPU.
        seed: of the sample, which does not depend on how the vectors are cut into batches.
    """

    def __init__(self, dim: int, rows: int | None = None, seed: int = 0) -> None:
        self._dim = dim
        self._limit = max(1, SAMPLE_BYTES // (4 * dim)) if rows is None else rows
        self._gpu_limit = max(1, GPU_SAMPLE_BYTES // (4 * dim)) if rows is None else rows
        self._draw = np.random.RandomState(seed)
        self._kept: list[torch.Tensor] = []
        self._tickets = np.empty(0)
        self._n, self._fourth = 0, 0.0
        self._pivot: torch.Tensor | None = None
        self._total = torch.zeros(dim, dtype=torch.float64)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64)

    def see(self, batches: Iterable[torch.Tensor]) -> Passing:
        """Take in batches (n, dim) of float32, all on one device."""
        for batch in batches:
            if len(batch):
                self._measure(batch)
                self._keep(batch)
        return self

    @property
    def moments(self) -> Moments:
        """Moments of all of them."""
        if self._pivot is None:
            raise InputError("train got no vectors; give at least 2")
        pivot, total, outer = (
            part.cpu().numpy() for part in (self._pivot, self._total, self._outer)
        )
        return Moments(self._n, pivot, total, outer, self._fourth)

    @property
    def sample(self) -> torch.Tensor:
        """Vectors (m, dim) float32, in the order in which they came."""
        return self._shrink()

    def _measure(self, batch: torch.Tensor) -> None:
        if self._pivot is None:
            self._pivot = batch.mean(0, dtype=torch.float64)
            self._total, self._outer = self._total.to(batch.device), self._outer.to(batch.device)
        self._n += len(batch)
        for part in batch.split(CHUNK_ROWS):
            centred = part.to(self._pivot) - self._pivot
            self._total += centred.sum(0)
            self._outer += centred.T @ centred
            self._fourth += float(centred.square().sum(1).square().sum())

    def _keep(self, batch: torch.Tensor) -> None:
        """Keep the vectors with the smallest of uniform random numbers."""
        if batch.device.type == "cuda":
            self._limit = self._gpu_limit
        self._kept.append(batch.to(torch.float32, copy=True))
        self._tickets = np.concatenate([self._tickets, self._draw.random_sample(len(batch))])
        if len(self._tickets) > 2 * self._limit:
            self._shrink()

    def _shrink(self) -> torch.Tensor:
        kept = torch.cat(self._kept) if self._kept else torch.empty(0, self._dim)
        if len(kept) > self._limit:
            chosen = np.sort(np.argpartition(self._tickets, self._limit)[: self._limit])
            kept, self._tickets = kept[torch.from_numpy(chosen)], self._tickets[chosen]
        self._kept = [kept]
        return kept
