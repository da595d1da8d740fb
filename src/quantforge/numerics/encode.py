"""The definition of a code, operation by operation, in float32.

Every backend repeats these operations in this order, each rounded once and none fused, so codes
and scales are the same bits on numpy, torch and a GPU. (The QR rotation is a matmul and exempt.)

    x'    = (x - shift) * (1 / equalizer)
    p     = 1 if 2^-32 <= max|x'| < 2^32            an exact power of two: no overflow below
            else 2^floor(log2 max|x'|)
    v     = x' / p
    norm  = sqrt(tree_sum(v * v))
    u     = butterfly(v * signs) * (1 / norm)       coordinates of mean square 1; without a
                                                    rotation (v * sqrt(d)) * (1 / norm)
    code  = number of boundaries below u            c = centroids[code]
    a     = d / <u, c>  |  sqrt(d / <c, c>)  |  <u, c> / <c, c>      "unbiased" | "norm" | "mse"
    scale = fp16(norm / sqrt(d) * a * p)

so that x ~= shift + equalizer * R^T (scale * c) with R = H diag(signs) / sqrt(d).

The QJL residual (estimator "prod"; arXiv 2504.19874, Algorithm 2) adds one sign per channel of a
second, independent rotation P of what the code leaves over. With an orthogonal P the factor is
sqrt(pi / (2 d)) ||r||, where the paper's Gaussian matrix has sqrt(pi / 2) / d ||r||.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import pi, sqrt

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.packing import pack, row_bytes, unpack
from quantforge.numerics.rotation import butterfly, qjl_seed, rotation_matrix, rotation_signs
from quantforge.spec import QuantSpec, hadamard_base

F32 = NDArray[np.float32]
SMALLEST_NORMAL = np.float32(2.0**-126)


ORDINARY = (2.0**-32, 2.0**32)
"""Vectors whose greatest magnitude lies in here (the end excluded) are not scaled."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Packed vectors: what `quantize` returns and `decode` reads.

    Attributes:
        packed: (..., row_bytes) uint8 planes of codes; with estimator "prod" the plane of QJL
            signs follows them.
        scales: (..., 1) in the spec's scale dtype; with "prod" (..., 2), the residual's second.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.floating]


@dataclass(frozen=True)
class EncodeConstants:
    """Scalar factors of the definition, rounded once to float32 (as Python floats)."""

    dim: float
    sqrt_dim: float
    inv_sqrt_dim: float
    qjl: float


@lru_cache(maxsize=256)
def encode_constants(dim: int) -> EncodeConstants:
    """Return the factors for one dim, each the float32 nearest to its exact value."""
    exact = (dim, sqrt(dim), 1 / sqrt(dim), sqrt(pi / 2) / dim)
    return EncodeConstants(*(float(np.float32(value)) for value in exact))


def tree_sum(x: F32) -> F32:
    """Sum (..., n) over its last axis by halving, as if padded with zeros to a power of two."""
    while (n := x.shape[-1]) > 1:
        half = 1 << ((n - 1).bit_length() - 1)
        head = x[..., :half].copy()
        head[..., : n - half] += x[..., half:]
        x = head
    return x[..., 0]


def floor_power_of_two(x: F32) -> F32:
    """Return the greatest power of two <= x, at least the smallest normal float32."""
    power = (x.view(np.int32) & 0x7F800000).view(np.float32)
    return np.maximum(power, SMALLEST_NORMAL)


def power_of(peak: F32) -> F32:
    """Return p of the definition for vectors whose greatest magnitude is `peak`."""
    is_ordinary = (peak >= np.float32(ORDINARY[0])) & (peak < np.float32(ORDINARY[1]))
    return np.where(is_ordinary, np.float32(1), floor_power_of_two(peak))


def _rotate_raw(v: F32, spec: QuantSpec, seed: int) -> F32:
    """Return sqrt(d) R v, in float32."""
    if spec.rotation == "qr":
        matrix = rotation_matrix(spec, seed=seed) * sqrt(spec.dim)
        return v @ matrix.T.astype(np.float32)
    if spec.rotation == "none":
        return v * np.float32(encode_constants(spec.dim).sqrt_dim)
    base = hadamard_base(spec.dim)
    assert base is not None, "QuantSpec admits only dims that have a Hadamard rotation"
    return butterfly(v * rotation_signs(spec.dim, seed), base)


def _reciprocal(x: F32) -> F32:
    """Return 1 / x, and 0 where x is 0."""
    return np.divide(np.float32(1), x, out=np.zeros_like(x), where=x != 0)


def encode(
    x: NDArray[np.floating],
    spec: QuantSpec,
    shift: F32 | None = None,
    equalizer: F32 | None = None,
) -> Encoded:
    """Encode vectors (..., dim) of finite float16, float32 or float64 values.

    `shift` and `equalizer` broadcast against x. A scale beyond fp16 becomes infinite: callers
    check. Source: arXiv 2504.19874, Algorithms 1 and 2; scale rules as in the module docstring.
    """
    constants = encode_constants(spec.dim)
    one_by_sqrt_dim = np.float32(constants.inv_sqrt_dim)
    v = x.astype(np.float32)
    if shift is not None:
        v = v - shift.astype(np.float32)
    if equalizer is not None:
        v = v * (np.float32(1) / equalizer.astype(np.float32))
    power = power_of(np.abs(v).max(axis=-1))
    v = v * (np.float32(1) / power)[..., None]
    norm = np.sqrt(tree_sum(v * v))
    inverse_norm = _reciprocal(norm)

    u = _rotate_raw(v, spec, spec.seed) * inverse_norm[..., None]
    codebook = codebook_of(spec)
    codes = np.searchsorted(codebook.boundaries, u, side="left").astype(np.uint8)
    c = codebook.centroids[codes]
    uc, cc = tree_sum(u * c), tree_sum(c * c)
    if spec.scale_rule == "unbiased":
        factor = np.float32(constants.dim) * _reciprocal(uc)
    elif spec.scale_rule == "norm":
        factor = np.sqrt(np.float32(constants.dim) * _reciprocal(cc))
    else:
        factor = uc * _reciprocal(cc)
    with np.errstate(over="ignore"):
        scales = (norm * one_by_sqrt_dim * factor * power).astype(spec.scale_dtype)
    packed = pack(codes, spec.code_bits)
    if spec.estimator == "mse":
        return Encoded(packed, scales[..., None])

    with np.errstate(over="ignore", invalid="ignore"):  # an infinite scale leaves inf and NaN over
        stored = scales.astype(np.float32) * (np.float32(1) / power)
        stored = stored * (np.float32(constants.sqrt_dim) * inverse_norm)
        left = u - stored[..., None] * c
        signs = _rotate_raw(left, spec, qjl_seed(spec.seed)) > 0
        left_norm = np.sqrt(tree_sum(left * left))
        left_scales = left_norm * norm * np.float32(constants.qjl) * power
        left_scales = left_scales.astype(spec.scale_dtype)
    return Encoded(
        np.concatenate([packed, pack(signs.astype(np.uint8), 1)], axis=-1),
        np.stack([scales, left_scales], axis=-1),
    )


def decode(
    encoded: Encoded,
    spec: QuantSpec,
    shift: NDArray[np.floating] | None = None,
    equalizer: NDArray[np.floating] | None = None,
) -> NDArray[np.float64]:
    """Decode to float64 vectors (..., dim): the oracle of `dequantize`."""
    codes = unpack(encoded.packed, spec.dim, spec.code_bits)
    scales = encoded.scales.astype(np.float64)
    rotated = scales[..., :1] * codebook_of(spec).centroids.astype(np.float64)[codes]
    if spec.estimator == "prod":
        sign_plane = encoded.packed[..., row_bytes(spec.dim, spec.code_bits) :]
        signs = 2.0 * unpack(sign_plane, spec.dim, 1) - 1.0
        projection = rotation_matrix(spec, seed=qjl_seed(spec.seed))
        rotated += scales[..., 1:] * (signs @ projection)
    x = rotated @ rotation_matrix(spec)
    if equalizer is not None:
        x = x * equalizer.astype(np.float64)
    if shift is not None:
        x = x + shift.astype(np.float64)
    return x
