"""Codes of vectors for search: three ways of knowing the data, one format. The float64 oracle.

    r = x - mean                                     q is centred too: p = q - mean
    u = F r            F = diag(1/step) B diag(1/equalizer)
    g = sqrt(sum w u^2 / sum w)                      one number per vector
    code_i = nearest centroid of u_i / g with bits_i bits (0 bits: no code, c_i = 0)
    scale  = sum w u^2 / sum w u c
    r^ = scale G^T c       G = diag(step) B diag(equalizer)
    <q, x> ~= <q, mean> + <mean, r> + <p, r^>  =  <q, mean> + <q, r^> + <mean, r - r^>

    mode          mean, equalizer   basis B              step, bits
    oblivious     0, 1              random rotation      1, all equal
    centred       of the data       random rotation      one step, all equal
    adapted       mean, 1           PCA, then a random   RMS of the segment; bits chosen for the
                                    rotation inside      least error of scores
                                    each segment

Segments are runs of 16 principal directions, loud ones first. Bits minimize the sum over segments
of `variance * energy^0.5 * D(bits)`: D is the distortion of Lloyd-Max and energy the variance of
queries, for which the vectors stand in. The weights w of an adapted code are energy^0.5 likewise;
of the others 1. <mean, r> is exact, so what is coded is the part that no mean explains. The mean
may be the centroid of a list of vectors near each other: then r and p are counted from there, while
step and basis are those of all residuals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantforge.errors import InputError
from quantforge.numerics.codebook import load_codebook
from quantforge.numerics.lloyd_max import distortion
from quantforge.numerics.packing import row_bytes
from quantforge.numerics.rotation import haar_matrix, rotation_matrix
from quantforge.numerics.statistics import equalizer_from_rms
from quantforge.spec import MAX_BITS, QuantSpec, Rotation, hadamard_base

F64 = NDArray[np.float64]
Mode = Literal["oblivious", "centred", "adapted"]

SEGMENT = 16
ENERGY_EXPONENT = 0.5
ERROR_PRIOR, ERROR_STEPS, ERROR_QUERIES = 32, 30, 256
MIN_STEP = 1e-6
"""Least step relative to the greatest: directions without variance must not divide by zero."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over a sample of n vectors, about a pivot near their mean.

    Attributes:
        n: vectors.
        pivot: (dim,).
        total: (dim,), the sum of x - pivot.
        outer: (dim, dim), the sum of (x - pivot)(x - pivot)^T.
        fourth: the sum of |x - pivot|^4.
    """

    n: int
    pivot: F64
    total: F64
    outer: F64
    fourth: float

    @property
    def mean(self) -> F64:
        """Mean of the vectors."""
        return self.pivot + self.total / self.n

    @property
    def covariance(self) -> F64:
        """Covariance, shrunk towards a multiple of the identity by Ledoit and Wolf's rule.

        Without it few vectors of isotropic data seem to have loud and quiet directions.
        Source: Ledoit and Wolf, J. Multivariate Analysis 88 (2004), section 3.3.
        """
        offset = self.total / self.n
        sample = self.outer / self.n - np.outer(offset, offset)
        level = np.trace(sample) / len(sample)
        target = level * np.eye(len(sample))
        spread = np.square(sample - target).sum()
        noise = (self.fourth / self.n - np.square(sample).sum()) / self.n
        share = float(np.clip(noise / spread, 0, 1)) if spread > 0 else 1.0
        return share * target + (1 - share) * sample


@dataclass(frozen=True, eq=False)
class VectorCode:
    """What is known of the data, and so how vectors are coded.

    Attributes:
        mean, equalizer: (dim,).
        basis: (dim, dim) orthogonal, rows are directions.
        step: (dim,) one per direction.
        weights: (dim,) of the scale rule.
        bits: (dim,) of each direction, falling.
        errors: (dim,) variance of the error of `scale c` in units of scale^2, along each direction
            before the rotation inside segments.
    """

    mean: F64
    equalizer: F64
    basis: F64
    step: F64
    weights: F64
    bits: NDArray[np.int64]
    errors: F64

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in vars(self).values())

    @property
    def groups(self) -> list[tuple[int, slice]]:
        """Bits and directions of each run of equal bits; those without code are left out."""
        found = []
        for bits in range(MAX_BITS, 0, -1):
            where = np.flatnonzero(self.bits == bits)
            if where.size:
                found.append((bits, slice(int(where[0]), int(where[-1]) + 1)))
        return found

    @property
    def forward(self) -> F64:
        """F, (dim, dim)."""
        return self.basis / self.step[:, None] / self.equalizer

    @property
    def dual(self) -> F64:
        """G, (dim, dim): F^T G is the identity."""
        return self.basis * self.step[:, None] * self.equalizer


@lru_cache(maxsize=1)
def distortions() -> F64:
    """Return the mean square error of a Gaussian coordinate at 0-8 bits, (9,)."""
    found = [1.0]
    for bits in range(1, MAX_BITS + 1):
        centroids = load_codebook("gaussian", bits, SEGMENT).centroids.astype(np.float64)
        found.append(distortion(centroids[len(centroids) // 2 :]))
    return np.array(found)


def plain_spec(dim: int, bits: int, seed: int) -> QuantSpec:
    """Return the spec of a run of directions; its rotation is the one to undo or to reuse."""
    rotation: Rotation = "qr" if hadamard_base(dim) is None else "hadamard"
    return QuantSpec(dim, bits, rotation=rotation, seed=seed, codebook="gaussian")


def allocate(variance: F64, widths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Return bits 0-8 of segments, at most `budget` bits a vector in all.

    Greedy by gain per dimension, which is optimal for equal widths: D is convex.
    """
    lost = distortions()
    cost = variance ** (1 + ENERGY_EXPONENT)
    bits = np.zeros(len(variance), np.int64)
    left = budget
    while True:
        gain = np.full(len(bits), -1.0)
        open_ = (bits < MAX_BITS) & (widths <= left)
        gain[open_] = cost[open_] * (lost[bits[open_]] - lost[bits[open_] + 1])
        best = int(np.argmax(gain))
        if gain[best] < 0:
            return np.minimum.accumulate(bits)
        bits[best] += 1
        left -= int(widths[best])


def theoretical_errors(weights: F64, bits: NDArray[np.int64]) -> F64:
    """Return `VectorCode.errors` for Gaussian coordinates that do not know of each other.

    A coordinate u becomes `scale ((1 - D) u + noise of variance D (1 - D))`, and the scale divides
    by the weighted mean of 1 - D.
    """
    lost = distortions()[bits]
    kept = (weights * (1 - lost)).sum() / weights.sum()
    return (1 - lost - kept) ** 2 + lost * (1 - lost)


def oblivious(dim: int, bits: int, seed: int) -> VectorCode:
    """Return the code that knows nothing of the data."""
    ones = np.ones(dim)
    basis, every = rotation_matrix(plain_spec(dim, bits, seed)), np.full(dim, bits)
    errors = theoretical_errors(ones, every)
    return VectorCode(np.zeros(dim), ones, basis, ones, ones, every, errors)


def learn(mode: Mode, moments: Moments, bits: int, seed: int) -> VectorCode:
    """Return the code of a mode for data with these moments.

    Raises:
        InputError: for fewer than two vectors.
    """
    dim = len(moments.pivot)
    if mode == "oblivious":
        return oblivious(dim, bits, seed)
    if moments.n < 2:
        raise InputError(
            f'mode="{mode}" learns from at least 2 vectors; got {moments.n}; give more, or use '
            'mode="oblivious"'
        )
    covariance, ones = moments.covariance, np.ones(dim)
    if mode == "centred":
        variance = np.maximum(np.diag(covariance), 0)
        equalizer = equalizer_from_rms(np.sqrt(variance))
        level = float(np.sqrt((variance / equalizer**2).mean())) or 1.0
        basis, every = rotation_matrix(plain_spec(dim, bits, seed)), np.full(dim, bits)
        errors = theoretical_errors(ones, every)
        return VectorCode(moments.mean, equalizer, basis, level * ones, ones, every, errors)
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(-values, kind="stable")
    values, basis = np.maximum(values[order], 0), vectors.T[order]
    starts = np.arange(0, dim, SEGMENT)
    widths = np.minimum(SEGMENT, dim - starts)
    variance = np.add.reduceat(values, starts) / widths
    for where, rotation in segment_rotations(dim, seed):
        basis[where] = rotation @ basis[where]
    peak = float(variance.max())
    step = np.sqrt(np.maximum(variance, MIN_STEP**2 * peak)) if peak > 0 else np.ones(len(widths))
    weights = step ** (2 + 2 * ENERGY_EXPONENT)
    step, weights = np.repeat(step, widths), np.repeat(weights / weights.mean(), widths)
    chosen = _within_bytes(variance, widths, bits)
    errors = theoretical_errors(weights, chosen)
    return VectorCode(moments.mean, ones, basis, step, weights, chosen, errors)


def _within_bytes(variance: F64, widths: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Return bits (dim,) of directions that take no more bytes than `bits` for each.

    Planes of a group are padded, so several groups may need more than their bits.
    """
    dim = int(widths.sum())
    budget = bits * dim
    while True:
        chosen = np.repeat(allocate(variance, widths, budget), widths)
        runs = [(b, int((chosen == b).sum())) for b in range(1, MAX_BITS + 1)]
        if sum(row_bytes(n, b) for b, n in runs if n) <= row_bytes(dim, bits):
            return chosen
        budget -= SEGMENT


def segment_rotations(dim: int, seed: int) -> list[tuple[slice, F64]]:
    """Return the rotation of principal directions inside each segment."""
    found = []
    for i, start in enumerate(range(0, dim, SEGMENT)):
        where = slice(start, min(start + SEGMENT, dim))
        found.append((where, haar_matrix(where.stop - where.start, (seed + 1 + i) % 2**32)))
    return found


def unmix(mode: Mode, u: F64, seed: int) -> F64:
    """Return coordinates (n, dim) along directions before the rotation inside segments."""
    if mode != "adapted":
        return u
    parts = [u[:, where] @ rotation for where, rotation in segment_rotations(u.shape[1], seed)]
    return np.concatenate(parts, axis=1)


@dataclass(frozen=True, eq=False)
class EncodedVectors:
    """Codes (n, dim) uint8, scales (n,) fp16 and exact <centre, r - r^> (n,) float64."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    offsets: F64


def _centroids(code: VectorCode, codes: NDArray[np.uint8]) -> F64:
    c = np.zeros(codes.shape)
    for bits, where in code.groups:
        centroids = load_codebook("gaussian", bits, where.stop - where.start).centroids
        c[:, where] = centroids.astype(np.float64)[codes[:, where]]
    return c


def _encode(code: VectorCode, r: F64) -> tuple[NDArray[np.uint8], NDArray[np.float16], F64, F64]:
    """Return codes and scales of residuals, the coordinates u, and c."""
    u = r @ code.forward.T
    energy = (code.weights * u * u).sum(-1)
    g = np.sqrt(energy / code.weights.sum())
    v = u / np.where(g > 0, g, 1)[:, None]
    codes = np.zeros(u.shape, np.uint8)
    for bits, where in code.groups:
        boundaries = load_codebook("gaussian", bits, where.stop - where.start).boundaries
        codes[:, where] = np.searchsorted(boundaries.astype(np.float64), v[:, where])
    c = _centroids(code, codes)
    agreement = (code.weights * u * c).sum(-1)
    scales = np.divide(energy, agreement, out=np.zeros_like(energy), where=agreement > 0)
    return codes, scales.astype(np.float16), u, c


def encode(code: VectorCode, x: F64, centre: F64 | None = None) -> EncodedVectors:
    """Encode vectors (n, dim).

    Args:
        code: what is known of the data.
        x: the vectors.
        centre: (n, dim) or (dim,), what r is counted from; None for the mean.
    """
    centre = code.mean if centre is None else centre
    codes, scales, u, c = _encode(code, x - centre)
    lost = (u - scales.astype(np.float64)[:, None] * c) @ code.dual
    return EncodedVectors(codes, scales, (lost * centre).sum(-1))


def decode(code: VectorCode, encoded: EncodedVectors, centre: F64 | None = None) -> F64:
    """Decode vectors (n, dim)."""
    c = _centroids(code, encoded.codes) * encoded.scales.astype(np.float64)[:, None]
    return (code.mean if centre is None else centre) + c @ code.dual


def product_error(code: VectorCode, r: F64) -> float:
    """Return the mean square error of products of some residuals with the others, (n, dim)."""
    asked = _asked(len(r))
    _, scales, u, c = _encode(code, r[asked:])
    lost = u - scales.astype(np.float64)[:, None] * c
    return float(np.square(r[:asked] @ code.dual.T @ lost.T).mean()) if asked else 0.0


def _asked(n: int) -> int:
    """Return how many of a sample stand in for queries."""
    return min(ERROR_QUERIES, n // 2)


def with_measured_errors(code: VectorCode, mode: Mode, seed: int, r: F64) -> VectorCode:
    """Return a code whose errors are those of a sample of residuals (n, dim).

    Solves for errors that `standard_errors` turns into the mean square error seen along each
    direction, by a few multiplicative steps from theory, which stands in for ERROR_PRIOR rows.
    Directions are not all: one factor then sets the errors seen of products with each other.
    """
    codes, scales, u, c = _encode(code, r)
    scale = scales.astype(np.float64)[:, None]
    decoded = unmix(mode, scale * c, seed)
    lost = unmix(mode, u, seed) - decoded
    pull, square = np.square(code.weights * decoded), np.square(scale[:, 0])

    def predicted(errors: F64) -> F64:
        norm = pull @ errors
        known = np.divide(square, norm, out=np.zeros_like(norm), where=norm > 0)
        return errors * square.mean() - np.square(errors) * (known @ pull) / len(r)

    share = len(r) / (len(r) + ERROR_PRIOR)
    wanted = share * np.square(lost).mean(0) + (1 - share) * predicted(code.errors)
    errors = code.errors
    for _ in range(ERROR_STEPS):
        now = predicted(errors)
        ratio = np.divide(wanted, now, out=np.ones_like(now), where=now > 0)
        errors = errors * np.clip(ratio, 0.25, 4)
    found = replace(code, errors=errors)
    asked = _asked(len(r))
    if asked:
        rest = EncodedVectors(codes[asked:], scales[asked:], np.zeros(len(r) - asked))
        expected = np.square(standard_errors(found, mode, seed, rest, r[:asked] + code.mean)).mean()
        seen = np.square(r[:asked] @ code.dual.T @ (u - scale * c)[asked:].T).mean()
        factor = share * seen / expected + 1 - share if expected > 0 else 1.0
        found = replace(found, errors=errors * factor)
    return found


def scores(code: VectorCode, encoded: EncodedVectors, query: F64) -> F64:
    """Return inner products (q, n) of queries with vectors coded about the mean."""
    scale = encoded.scales.astype(np.float64)
    found = (query @ code.dual.T) @ _centroids(code, encoded.codes).T * scale
    return found + (query @ code.mean)[:, None] + encoded.offsets


def standard_errors(
    code: VectorCode, mode: Mode, seed: int, encoded: EncodedVectors, query: F64
) -> F64:
    """Return the standard errors (q, n) of `scores`.

    The scale makes the error vector orthogonal to a = w c in the directions of the code:

        variance = scale^2 (sum e p^2 - (sum e p a)^2 / sum e a^2)       p = G (q - mean)
    """
    p = unmix(mode, (query - code.mean) @ code.dual.T, seed)
    a = unmix(mode, code.weights * _centroids(code, encoded.codes), seed)
    norm = np.square(a) @ code.errors
    known = np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)
    variance = (np.square(p) @ code.errors)[:, None] - np.square((p * code.errors) @ a.T) * known
    return np.sqrt(np.maximum(variance, 0)) * encoded.scales.astype(np.float64)
