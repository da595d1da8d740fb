"""Oracle of `combine`: float64 numpy on decoded vectors; arXiv 2504.19874, Algorithm 1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.encode import Encoded, decode
from quantforge.spec import QuantSpec


def combine(
    weights: NDArray[np.floating],
    encoded: Encoded,
    spec: QuantSpec,
    shift: NDArray[np.floating] | None = None,
    equalizer: NDArray[np.floating] | None = None,
) -> NDArray[np.float64]:
    """Return `weights @ decode(encoded)`, (..., q, dim)."""
    return weights.astype(np.float64) @ decode(encoded, spec, shift, equalizer)
