"""Codebooks: centroids to decode with and boundaries to encode with, from stored data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.lloyd_max import DATA_FILE, GAUSSIAN
from quantforge.spec import QuantSpec, own_centroids


@dataclass(frozen=True, eq=False)
class Codebook:
    """A scalar quantizer of coordinates u with mean square 1.

    Attributes:
        centroids: (2^bits,) float32, ascending, in a unit of their own that scales absorb.
        boundaries: (2^bits - 1,) float32, in units of u; the code of u is the number of
            boundaries strictly below u. The last `bits` bits of a boundary are the number of those
            below it, so that one lookup finds both.
    """

    centroids: NDArray[np.float32]
    boundaries: NDArray[np.float32]


@lru_cache(maxsize=1)
def _tables() -> dict[str, NDArray]:
    with np.load(DATA_FILE, allow_pickle=False) as data:
        return dict(data)


def _positive_half(row: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    start = 2 ** (bits - 1) - 1
    return row[start : start + 2 ** (bits - 1)]


@lru_cache(maxsize=256)
def load_codebook(name: str, bits: int, dim: int) -> Codebook:
    """Return the stored codebook, or the one whose centroids are listed.

    "lloyd_max" takes the tabulated dim nearest in 1/d; from dim 74 on this costs less than 1e-4
    of the distortion at any bits, between smaller dims of the table up to 1.5% (tested).
    """
    if (own := own_centroids(name)) is not None:
        halfway = (own[1:].astype(np.float64) + own[:-1]) / 2
        return Codebook(own, _numbered(halfway.astype(np.float32), bits))
    tables, unit = _tables(), 1.0
    if name == "e4m3":
        positive = _positive_half(tables["e4m3_centroids"], bits)
        unit = float(tables["e4m3_units"][bits - 1])
    else:
        inverse = np.array([0.0 if d == GAUSSIAN else 1.0 / d for d in tables["dims"]])
        wanted = 1.0 / dim if name == "lloyd_max" else 0.0
        row = tables["centroids"][np.argmin(np.abs(inverse - wanted))]
        positive = _positive_half(row, bits)
    centroids = np.concatenate([-positive[::-1], positive])
    boundaries = unit * (centroids[1:] + centroids[:-1]) / 2
    return Codebook(centroids.astype(np.float32), _numbered(boundaries.astype(np.float32), bits))


def _numbered(boundaries: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Return boundaries with their numbers in place of their last bits.

    They move by less than 2^(bits - 23) of themselves; a zero becomes a number of 1e-43 at most.
    """
    numbers = np.arange(len(boundaries), dtype=np.int32)
    return ((boundaries.view(np.int32) & -(1 << bits)) | numbers).view(np.float32)


@lru_cache(maxsize=256)
def is_symmetric(spec: QuantSpec) -> bool:
    """Return whether c is a centroid wherever -c is: some kernels look up magnitudes alone."""
    centroids = codebook_of(spec).centroids
    return np.array_equal(centroids, -centroids[::-1])


def codebook_of(spec: QuantSpec) -> Codebook:
    """Return the codebook a spec encodes with."""
    return load_codebook(spec.codebook, spec.code_bits, spec.dim)
