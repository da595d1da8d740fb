"""Oracle of `search`: float64 numpy, sorted in full; arXiv 2504.19874, section 3.2."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.encode import Encoded
from quantforge.ops.scores.reference import scores
from quantforge.spec import QuantSpec


def search(
    query: NDArray[np.floating],
    encoded: Encoded,
    spec: QuantSpec,
    k: int,
    shift: NDArray[np.floating] | None = None,
    equalizer: NDArray[np.floating] | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the k best scores (q, k), falling, and their rows; equal scores by rising row."""
    every = scores(query, encoded, spec, shift, equalizer)
    hidden = np.isnan(every) if allowed is None else np.isnan(every) | ~allowed
    every = np.where(hidden, -np.inf, every)
    missing = max(0, k - every.shape[1])
    every = np.pad(every, ((0, 0), (0, missing)), constant_values=-np.inf)
    ids = np.argsort(-every, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(every, ids, axis=1)
    return best, np.where(np.isneginf(best), -1, ids).astype(np.int64)
