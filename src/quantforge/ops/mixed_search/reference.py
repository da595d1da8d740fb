"""Oracle of `mixed_search`: numpy integers, then float32 in the order that the operator has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.integers import integer_table, query_integers
from quantforge.spec import QuantSpec


def mixed_scores(
    query: NDArray[np.float32],
    codes: list[NDArray[np.uint8]],
    specs: list[QuantSpec],
    scales: NDArray[np.float16],
    offsets: NDArray[np.float16],
    base: NDArray[np.float32],
    unit: float,
) -> NDArray[np.float32]:
    """Return scores (q, n) of codes, per group (n, width)."""
    total, start = np.zeros((len(query), len(scales)), np.float32), 0
    for spec, part in zip(specs, codes, strict=True):
        table = integer_table(spec)
        z, query_unit = query_integers(query[:, start : start + spec.dim], spec)
        sums = z @ table.values.astype(np.int64)[part].T
        total += sums.astype(np.float32) * (query_unit * table.unit)[:, None]
        start += spec.dim
    added = offsets.astype(np.float32) * np.float32(unit)
    scores: NDArray[np.float32] = (total * scales.astype(np.float32) + added) + base[:, None]
    return scores


def mixed_search(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the rows (q, k) of the best scores, equal ones rising."""
    rows: NDArray[np.int64] = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows
