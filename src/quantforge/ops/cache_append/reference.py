"""Oracle of `cache_append`: the numpy definition, written into numpy buffers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.encode import F32, Encoded, encode
from quantforge.spec import QuantSpec


def cache_append(
    buffer: Encoded,
    x: NDArray[np.floating],
    position: int,
    spec: QuantSpec,
    shift: F32 | None = None,
    equalizer: F32 | None = None,
) -> None:
    """Encode x (..., n, dim) into rows position .. position + n of the buffer."""
    new = encode(x, spec, shift, equalizer)
    rows = slice(position, position + x.shape[-2])
    buffer.packed[..., rows, :] = new.packed
    buffer.scales[..., rows, :] = new.scales
