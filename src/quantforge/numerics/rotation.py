"""Seeded rotations R: randomized Hadamard `H diag(signs) / sqrt(d)`, Haar by QR, or none.

Random streams come from `numpy.random.RandomState`, which numpy keeps frozen (NEP 19), so a
seed means the same rotation for ever.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.hadamard import Terms, dense_program, hadamard_matrix
from quantforge.spec import QuantSpec, hadamard_base

QJL_SEED_OFFSET = 0x51A5
"""Added to the seed for the QJL projection, which must be independent of the rotation."""


def qjl_seed(seed: int) -> int:
    """Return the seed of the QJL projection that goes with a rotation seed."""
    return (seed + QJL_SEED_OFFSET) % 2**32


@lru_cache(maxsize=256)
def rotation_signs(dim: int, seed: int) -> NDArray[np.float32]:
    """Return the diagonal of the randomized Hadamard rotation: (dim,) of +-1."""
    bits = np.random.RandomState(seed).randint(0, 2, size=dim)
    return (1 - 2 * bits).astype(np.float32)


@lru_cache(maxsize=16)
def haar_matrix(dim: int, seed: int) -> NDArray[np.float64]:
    """Return a Haar-distributed orthogonal matrix, (dim, dim), from the QR of a Gaussian one."""
    q, r = np.linalg.qr(np.random.RandomState(seed).standard_normal((dim, dim)))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def rotation_matrix(spec: QuantSpec, *, seed: int | None = None) -> NDArray[np.float64]:
    """Return R as a dense orthogonal (dim, dim) float64 matrix; rotating is `x @ R.T`."""
    seed = spec.seed if seed is None else seed
    if spec.rotation == "qr":
        return haar_matrix(spec.dim, seed)
    if spec.rotation == "none":
        return np.eye(spec.dim)
    base = hadamard_base(spec.dim)
    assert base is not None, "QuantSpec admits only dims that have a Hadamard rotation"
    power = (spec.dim // base).bit_length() - 1
    signed = hadamard_matrix(power, base) * rotation_signs(spec.dim, seed)
    return signed / np.sqrt(spec.dim)


def butterfly(x: NDArray[np.float32], order: int) -> NDArray[np.float32]:
    """Return `H x` for the unnormalized Hadamard matrix along the last axis, in float32.

    `order` is the base of the dim: 1, 12, 20 or 28. The order of additions is part of the format:
    first the factors of the dense stage, terms added from left to right, then butterflies
    `(a + b, a - b)` of stride 1, 2, 4, ... Every backend repeats it and so gets the same bits.
    """
    dim = x.shape[-1]
    lead, run = x.shape[:-1], dim // order
    parts = [x[..., j * run : (j + 1) * run] for j in range(order)]
    for factor in dense_program(order):
        parts = [_sum_of_terms(parts, terms) for terms in factor]
    x = np.concatenate(parts, axis=-1)
    stride = 1
    while stride < run:
        pairs = x.reshape(*lead, dim // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([a + b, a - b], axis=-2).reshape(*lead, dim)
        stride *= 2
    return x


def _sum_of_terms(parts: list[NDArray[np.float32]], terms: Terms) -> NDArray[np.float32]:
    (first, coefficient), *others = terms
    total = parts[first] * np.float32(coefficient)
    for index, coefficient in others:
        total = total + parts[index] * np.float32(coefficient)
    return total
