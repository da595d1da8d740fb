"""Shift and equalizer: what is taken out of the data before it is rotated.

    x = shift + equalizer * x'

The shift is the mean; the equalizer is the square root of each channel's RMS about it, so that
a few loud channels do not take the bits of the quiet ones. With keys alone the exponent 1/2 is
the safe choice: it splits the error between keys and queries (1.0 moves all of it).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EQUALIZER_EXPONENT = 0.5
MIN_EQUALIZER = 1e-3
"""Least equalizer relative to the greatest: a constant channel must not divide by zero."""


def equalizer_from_rms(rms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the equalizer (..., dim) of channel RMS values (..., dim).

    Each is scaled so that its greatest channel is 1 (a common factor changes nothing: the
    scales absorb it); all-zero input gives ones.
    """
    peak = rms.max(axis=-1, keepdims=True)
    relative = np.divide(rms, peak, out=np.ones_like(rms), where=peak > 0)
    return np.maximum(relative**EQUALIZER_EXPONENT, MIN_EQUALIZER)


def key_equalizer(
    key_rms: NDArray[np.float64], query_rms: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the equalizer (..., dim) of keys whose queries are known: sqrt(rms(k) / rms(q)).

    With a rotation after it, the error of a logit is in proportion to the product of
    `sum (k_i / e_i)^2` and `sum (q_i e_i)^2`, which is least for this e (Cauchy-Schwarz). Channels
    that no query reads are treated as read a thousandth as much as the loudest.
    """
    peak = query_rms.max(axis=-1, keepdims=True)
    floor = np.where(peak > 0, MIN_EQUALIZER * peak, 1.0)
    return equalizer_from_rms(key_rms / np.maximum(query_rms, floor))


def measure(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the shift and the equalizer, each (..., 1, dim), of vectors (..., n, dim)."""
    shift = x.mean(axis=-2, keepdims=True)
    rms = np.sqrt(np.square(x - shift).mean(axis=-2, keepdims=True))
    return shift, equalizer_from_rms(rms)
