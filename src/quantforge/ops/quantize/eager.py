"""Quantization in torch, bit for bit as `numerics.encode` (for Hadamard rotations).

Work is done on columns (dim, n): every step is then an elementwise operation on contiguous
memory, and chunks are small enough to stay in a CPU cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from quantforge.numerics.encode import ORDINARY, SMALLEST_NORMAL, encode_constants
from quantforge.numerics.packing import packed_width, planes, row_bytes
from quantforge.numerics.rotation import qjl_seed
from quantforge.ops import constants
from quantforge.ops.lookup import take
from quantforge.ops.statistics import flatten, is_shared
from quantforge.ops.transform import rotate_raw
from quantforge.spec import QuantSpec

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum columns (dim, n) over dim in the order of `numerics.encode.tree_sum`; overwrites x."""
    while (dim := x.shape[0]) > 1:
        half = 1 << ((dim - 1).bit_length() - 1)
        x[: dim - half] += x[half:]
        x = x[:half]
    return x[0]


def exact_sqrt(x: torch.Tensor) -> torch.Tensor:
    """Return the correctly rounded square root of float32 x.

    `torch.sqrt` is not: on CPU its vector library is one unit off for every sixth number. The
    detour through float64 is exact, because 53 bits exceed twice 24 + 2.
    """
    return x.to(torch.float64).sqrt_().to(torch.float32)


def _reciprocal(x: torch.Tensor) -> torch.Tensor:
    """Return 1 / x, and 0 where x is 0."""
    return torch.where(x == 0, 0.0, x.reciprocal())  # of -0.0 too: scales are compared as bytes


def nearest(u: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the number of boundaries below each u, uint8: the code of the nearest centroid.

    A binary search costs 17 ns a number on CPU at 4 bits, a lookup by uniform cell about 2 ns, with
    the same result: cells are monotone in u, and the one boundary inside is compared.
    """
    if u.device.type != "cpu":
        boundaries = constants.boundaries(spec, u.device)
        return torch.bucketize(u, boundaries, out_int32=True).to(torch.uint8)
    cells = constants.cells(spec, u.device)
    index = cells.index(u).flatten()
    above = u > take(cells.boundary, index).view_as(u)
    return take(cells.below, index).view_as(u) + above


def pack_columns(codes: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Pack uint8 codes (dim, n) into rows: out is (n, row_bytes), zeroed."""
    for plane in planes(codes.shape[0], bits):
        field = (codes >> plane.shift) & plane.mask
        row = field[: plane.stride].clone()
        for slot in range(1, plane.fields):
            part = field[slot * plane.stride : (slot + 1) * plane.stride]
            row[: part.shape[0]] |= part << (slot * plane.width)
        out[:, plane.offset : plane.offset + plane.stride] = row.T


def encode_columns(
    v: torch.Tensor, spec: QuantSpec, packed: torch.Tensor, scales: torch.Tensor
) -> None:
    """Encode float32 columns (dim, n) into rows of packed (n, bytes) and scales (n, 1 or 2)."""
    factors = encode_constants(spec.dim)
    peak = v.abs().amax(0)
    power = (peak.view(torch.int32) & 0x7F800000).view(torch.float32)
    power = power.clamp_min(float(SMALLEST_NORMAL))
    power = torch.where((peak >= ORDINARY[0]) & (peak < ORDINARY[1]), 1.0, power)
    v = v * power.reciprocal()
    norm = exact_sqrt(tree_sum(v * v))
    inverse_norm = _reciprocal(norm)
    if v.device.type == "cpu" and not bool(torch.isfinite(norm).all()):
        # lookups need numbers; the scale of a bad vector still says what is wrong
        bad = ~torch.isfinite(norm)
        v, inverse_norm = v.masked_fill(bad, 0.0), inverse_norm.masked_fill(bad, 0.0)

    u = rotate_raw(v, spec, spec.seed).mul_(inverse_norm)
    codes = nearest(u, spec)
    c = take(constants.centroids(spec, v.device), codes.flatten().to(torch.int32)).view_as(u)
    if spec.scale_rule == "unbiased":
        factor = factors.dim * _reciprocal(tree_sum(u * c))
    elif spec.scale_rule == "norm":
        factor = exact_sqrt(factors.dim * _reciprocal(tree_sum(c * c)))
    else:
        factor = tree_sum(u * c) * _reciprocal(tree_sum(c * c))
    scales[:, 0] = norm * factors.inv_sqrt_dim * factor * power
    code_bytes = row_bytes(spec.dim, spec.code_bits)
    pack_columns(codes, spec.code_bits, packed[:, :code_bytes])

    if spec.estimator == "prod":
        stored = scales[:, 0].to(torch.float32) * power.reciprocal()
        left = u - stored * (factors.sqrt_dim * inverse_norm) * c
        negative_or_positive = rotate_raw(left, spec, qjl_seed(spec.seed)) > 0
        left_norm = exact_sqrt(tree_sum(left * left))
        scales[:, 1] = left_norm * norm * factors.qjl * power
        pack_columns(negative_or_positive.to(torch.uint8), 1, packed[:, code_bytes:])


def _chunks(
    x: torch.Tensor, shift: torch.Tensor | None, equalizer: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, prepared float32 rows (..., n, dim)) along the second last axis of x."""
    inverse = None if equalizer is None else equalizer.to(torch.float32).reciprocal()
    others = math.prod(x.shape[:-2]) * x.shape[-1]
    step = max(1, CHUNK_ELEMENTS[x.device.type] // max(others, 1))
    for start in range(0, x.shape[-2], step):
        rows = slice(start, start + step)
        v = x[..., rows, :].to(torch.float32)
        if shift is not None:
            v = v - shift.to(torch.float32)
        if inverse is not None:
            v = v * inverse
        yield rows, v


def quantize_into(
    packed: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec: QuantSpec,
) -> None:
    """Quantize x (..., n, dim) into zeroed packed (..., n, bytes) and scales (..., n, 1 or 2)."""
    for rows, v in _chunks(x, shift, equalizer):
        columns = v.reshape(-1, spec.dim).T.contiguous()
        n = columns.shape[1]
        out = packed.new_zeros((n, packed.shape[-1]))
        out_scales = scales.new_empty((n, scales.shape[-1]))
        encode_columns(columns, spec, out, out_scales)
        packed[..., rows, :] = out.view(*v.shape[:-1], -1)
        scales[..., rows, :] = out_scales.view(*v.shape[:-1], -1)


def quantize(
    x: torch.Tensor, shift: torch.Tensor | None, equalizer: torch.Tensor | None, spec_key: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::quantize` on any device."""
    spec = QuantSpec.from_key(spec_key)
    scale_dtype = getattr(torch, spec.scale_dtype)
    packed = x.new_empty((*x.shape[:-1], packed_width(spec)), dtype=torch.uint8)
    scales = x.new_empty((*x.shape[:-1], spec.scales_per_vector), dtype=scale_dtype)
    if x.numel():
        if is_shared(shift) and is_shared(equalizer):  # one long axis: even chunks
            x = x.reshape(-1, spec.dim)
            rows = packed.view(-1, packed.shape[-1]), scales.view(-1, scales.shape[-1])
            quantize_into(*rows, x, flatten(shift), flatten(equalizer), spec)
        else:
            quantize_into(packed, scales, x, shift, equalizer, spec)
    return packed, scales
