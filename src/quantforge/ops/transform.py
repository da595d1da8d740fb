"""Rotations in torch: the exact butterfly that encodes, and fast ones for queries and outputs."""

from __future__ import annotations

import torch

from quantforge.numerics.encode import encode_constants
from quantforge.numerics.hadamard import Terms, dense_program
from quantforge.ops import constants
from quantforge.spec import QuantSpec, hadamard_base

MAX_DENSE_DIM = {"cpu": 256, "cuda": 1024}
"""Up to here a rotation is one matmul with a cached matrix (4 MiB at most).

A butterfly needs fewer operations but more launches: on one CPU thread it decodes dim 768 in 0.4
of the time of the matmul (docs/LOG.md, 2026-11-24)."""


def is_dense(spec: QuantSpec, device: torch.device) -> bool:
    """Return whether rotations that need not be bit-exact are matmuls."""
    return spec.rotation != "hadamard" or spec.dim <= MAX_DENSE_DIM[device.type]


def butterfly(x: torch.Tensor, *, transpose: bool = False) -> torch.Tensor:
    """Return `H x` (or `H^T x`) of columns (dim, n), float32, unnormalized; x is overwritten.

    Vectors are columns so that each addition runs over contiguous memory. The order of additions
    is that of `numerics.rotation.butterfly`.
    """
    dim, n = x.shape
    order = hadamard_base(dim)
    assert order is not None, "QuantSpec admits only dims that have a Hadamard rotation"
    parts = list(x.view(order, -1, n))
    for factor in dense_program(order, transpose=transpose):
        parts = [_sum_of_terms(parts, terms) for terms in factor]
    if order > 1:
        x = torch.stack(parts).view(dim, n)
    other, stride = torch.empty_like(x), 1
    while stride < dim // order:
        pairs, out = x.view(-1, 2, stride * n), other.view(-1, 2, stride * n)
        torch.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        x, other = other, x
        stride *= 2
    return x


def _sum_of_terms(parts: list[torch.Tensor], terms: Terms) -> torch.Tensor:
    (first, coefficient), *others = terms
    total = parts[first] if coefficient == 1 else parts[first] * coefficient
    for index, coefficient in others:  # exact: products are not rounded
        total = torch.add(total, parts[index], alpha=coefficient)
    return total


def rotate_raw(v: torch.Tensor, spec: QuantSpec, seed: int) -> torch.Tensor:
    """Return `sqrt(d) R v` of columns (dim, n), bit for bit as `numerics.encode` (not QR)."""
    if spec.rotation == "qr":
        return (constants.rotation(spec, seed, v.device) * spec.dim**0.5) @ v
    if spec.rotation == "none":
        return v * encode_constants(spec.dim).sqrt_dim
    return butterfly(v * constants.signs(spec.dim, seed, v.device))


def rotate(x: torch.Tensor, spec: QuantSpec, seed: int) -> torch.Tensor:
    """Return `R x` of rows (..., dim), float32; not bit-exact."""
    if spec.rotation == "none":
        return x
    if is_dense(spec, x.device):
        return x @ constants.rotation(spec, seed, x.device).T
    columns = x.reshape(-1, spec.dim).T.contiguous()
    y = butterfly(columns * constants.signs(spec.dim, seed, x.device))
    return (y * spec.dim**-0.5).T.reshape(x.shape)


def unrotate(y: torch.Tensor, spec: QuantSpec, seed: int) -> torch.Tensor:
    """Return `R^T y` of rows (..., dim), float32: the inverse of `rotate`."""
    if spec.rotation == "none":
        return y
    if is_dense(spec, y.device):
        return y @ constants.rotation(spec, seed, y.device)
    columns = y.reshape(-1, spec.dim).T.contiguous()
    x = butterfly(columns, transpose=True) * constants.signs(spec.dim, seed, y.device)
    return (x * spec.dim**-0.5).T.reshape(y.shape)
