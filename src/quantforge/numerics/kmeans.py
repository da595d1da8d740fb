"""One step of k-means: the float64 oracle.

Source: Lloyd, IEEE Trans. Information Theory 28 (1982).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def nearest(x: F64, centroids: F64) -> NDArray[np.int64]:
    """Return the nearest centroid of each vector, (n,); the first of equally near ones."""
    distances = np.square(x[:, None] - centroids[None]).sum(-1)
    return distances.argmin(1)


def lloyd_step(x: F64, centroids: F64) -> tuple[F64, NDArray[np.int64]]:
    """Return the mean of the vectors nearest to each centroid, and how many they are.

    A centroid to which no vector is nearest stays.
    """
    labels = nearest(x, centroids)
    counts = np.bincount(labels, minlength=len(centroids))
    moved = centroids.copy()
    for i in np.flatnonzero(counts):
        moved[i] = x[labels == i].mean(0)
    return moved, counts
