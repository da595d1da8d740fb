"""What is measured on: stored vectors, queries that are not among them, and the true results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from quantforge.errors import InputError
from quantforge.vectordb.checks import vectors_of
from quantforge.vectordb.config import Metric

QUERIES = 400
"""Held out of the data where no queries are given, at most a fifth of it."""
LEAST = 50
"""Vectors below which recall@10 and its halves of queries say nothing."""


@dataclass(frozen=True)
class Sample:
    """Vectors to store and queries to ask.

    Attributes:
        base: (n, dim) float32.
        queries: (m, dim) float32; none of them is in base.
        metric: of scores.
        k: neighbours that recall asks for.
    """

    base: torch.Tensor
    queries: torch.Tensor
    metric: Metric
    k: int

    @staticmethod
    def of(data: Any, queries: Any, metric: Metric, limit: int, seed: int, device: str) -> Sample:
        """Draw a sample from data (n, dim).

        Args:
            data: numpy (a memory map too) or torch.
            queries: (m, dim); None: rows of the data, which are then not stored.
            metric: cosine scales all vectors to length 1.
            limit: vectors stored, at most.
            seed: of what is drawn.
            device: where the sample is kept.

        Raises:
            InputError: for a wrong shape or dtype, NaN, infinity, or too few vectors.
        """
        if getattr(data, "ndim", 0) != 2 or len(data) < LEAST:
            raise InputError(
                f"data must have shape (n, dim) with at least {LEAST} vectors; got "
                f"{tuple(getattr(data, 'shape', ()))}"
            )
        order = np.random.RandomState(seed).permutation(len(data))
        held = 0 if queries is not None else min(QUERIES, len(data) // 5)
        unit = metric == "cosine"

        def rows(index: np.ndarray) -> torch.Tensor:
            chosen = np.sort(index)  # in the order of a file
            found = (
                data[torch.from_numpy(chosen)]
                if isinstance(data, torch.Tensor)
                else (np.asarray(data[chosen]))
            )
            return vectors_of(found, data.shape[1], unit_length=unit).to(device)

        base = rows(order[held : held + limit])
        asked = (
            rows(order[:held])
            if queries is None
            else vectors_of(queries, data.shape[1], unit_length=unit, what="queries").to(device)
        )
        if len(asked) < 4:
            raise InputError(f"there must be at least 4 queries; got {len(asked)}")
        return Sample(base, asked, metric, min(10, len(base)))

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.base.shape[1]

    def scores(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return scores (m, n) of all queries, greater is better, float32."""
        products = self.queries @ vectors.mT
        if self.metric != "l2":
            return products
        return 2 * products - vectors.square().sum(-1)

    @cached_property
    def nearest(self) -> torch.Tensor:
        """The k best of base for each query, (m, k) int64."""
        return self.scores(self.base).topk(self.k).indices

    def recall(self, found: torch.Tensor) -> np.ndarray:
        """Return the share of the nearest that was found (m, k), by query, (m,) float64."""
        hits = (self.nearest.to(found.device)[:, :, None] == found[:, None]).any(-1)
        return hits.double().mean(-1).cpu().numpy()
