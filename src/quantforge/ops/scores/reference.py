"""Oracle of `scores`: float64 numpy on decoded vectors; arXiv 2504.19874, section 3.2."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.encode import Encoded, decode
from quantforge.spec import QuantSpec


def scores(
    query: NDArray[np.floating],
    encoded: Encoded,
    spec: QuantSpec,
    shift: NDArray[np.floating] | None = None,
    equalizer: NDArray[np.floating] | None = None,
) -> NDArray[np.float64]:
    """Return `query @ decode(encoded)^T`, (..., q, n)."""
    vectors = decode(encoded, spec, shift, equalizer)
    return query.astype(np.float64) @ np.swapaxes(vectors, -1, -2)
