"""Queries made ready for a product with codes: one launch from any query to operand order.

    offset  = q . shift
    u       = R (equalizer * q)                  one program per query
    row     = u / max|u| in operand order, as fp16 or as int8 digits
    weight  = max|u|, times the unit of each digit

A Hadamard rotation of dim = A * B is two small matrix products, `H_A X H_B^T` with X the query as
an (A, B) matrix, because H_dim is the Kronecker product of the two; its entries are +-1, so three
tf32 products give float32 accuracy. QR rotations are done by cuBLAS before the launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from quantforge.numerics.hadamard import hadamard_matrix
from quantforge.ops import constants
from quantforge.ops.kernels import decode
from quantforge.ops.kernels.decode import Form, Layout
from quantforge.ops.statistics import equalize_query
from quantforge.ops.transform import rotate
from quantforge.spec import QuantSpec, hadamard_base

MAX_FACTORED_DIM = 1 << 14
"""Larger rotations do not fit into the registers of one program."""
DIGIT_BASE = 256
MAX_EXACT_DIM = 1024
"""Up to here float32 products take fewer instructions than tensor cores do: 400 for 736 at 128."""


@dataclass(frozen=True, eq=False)
class Queries:
    """Queries in operand order.

    Attributes:
        rows: (heads, columns, width) int8 digits, `per_tile * digits` columns per tile of queries,
            or (heads, q, width) fp16 or fp32.
        weights: float32 factor of each column.
        offsets: (heads, q) float32, `query . shift`, or None.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    offsets: torch.Tensor | None


@triton.jit
def _project(
    query, equalizer, shift, signs, left, right, position, rows, weights, offsets,
    stride_equalizer, stride_shift, columns_per_head, q, norm,
    DIM: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    B_USED: tl.constexpr, ROTATE: tl.constexpr, EQUALIZER: tl.constexpr, SHIFT: tl.constexpr,
    DIGITS: tl.constexpr, UNIT: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rotate one query and write it in operand order; a query from q on is zero."""
    head = tl.program_id(1).to(tl.int64)
    line = head * q + tl.program_id(0)
    a, b = tl.arange(0, A)[:, None], tl.arange(0, B)[None, :]
    channel = a * B_USED + b  # (A, B)
    live = (b < B_USED) & (channel < DIM)
    asked = channel * 0 + tl.program_id(0) < q
    x = tl.load(query + line * DIM + channel, mask=live & asked, other=0.0).to(tl.float32)
    if SHIFT:
        s = tl.load(shift + head * stride_shift + channel, mask=live, other=0.0).to(tl.float32)
        if tl.program_id(0) < q:
            tl.store(offsets + line, tl.sum(tl.sum(x * s, 1), 0))
    if EQUALIZER:
        e = tl.load(equalizer + head * stride_equalizer + channel, mask=live, other=0.0)
        x *= e.to(tl.float32)
    if ROTATE:
        x *= tl.load(signs + channel, mask=live, other=0.0)
        h = tl.load(left + a * A + tl.arange(0, A)[None, :])
        x = tl.dot(h, x, input_precision=PRECISION)
        h = tl.load(right + tl.arange(0, B)[:, None] * B + b)
        x = tl.dot(x, h, input_precision=PRECISION)
        x *= tl.cast(norm, tl.float32)
        x = tl.where(live, x, 0.0)
    place = tl.load(position + channel, mask=live, other=0)
    if NORMALIZE:
        peak = tl.max(tl.max(tl.abs(x), 1), 0)
        poison = tl.sum(tl.sum(x * 0.0, 1), 0)  # NaN if the query holds NaN or infinity
        safe = tl.maximum(peak, 1e-25)
        x = tl.where(tl.abs(x) <= 3.4e38, x, 0.0) / safe
        weight = safe + poison
    else:
        weight = tl.sum(tl.sum(x * 0.0, 1), 0) + 1.0
    if DIGITS == 0:
        target = rows + line * WIDTH + place
        tl.store(target, x.to(rows.dtype.element_ty), mask=live)
        tl.store(weights + line, weight)
    else:
        column = head * columns_per_head + tl.program_id(0) * DIGITS
        rest = tl.floor(x * (127.0 * 256.0 ** (DIGITS - 1)) + 0.5).to(tl.int32)
        for i in tl.static_range(DIGITS - 1, -1, -1):
            digit = rest
            if i > 0:
                digit = ((rest + 128) & 255) - 128
                rest = (rest - digit) >> 8
            tl.store(rows + (column + i) * WIDTH + place, digit.to(tl.int8), mask=live)
            tl.store(weights + column + i, weight * (UNIT / 127.0 / 256.0**i))


def _factors(dim: int) -> tuple[int, int]:
    """Return (A, B): dim = A * B, B a power of two, as even as possible with B >= A."""
    base = hadamard_base(dim)
    assert base is not None, "only Hadamard rotations are factored"
    b = 1
    while b * b < dim and (dim // base) % (2 * b) == 0:
        b *= 2
    return dim // b, b


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@constants.cached_constant
def _hadamard_factors(dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return H_A and H_B^T, zeros up to a power of two >= 16."""
    base = hadamard_base(dim) or 1
    a, b = _factors(dim)
    left = hadamard_matrix((a // base).bit_length() - 1, base)
    right = hadamard_matrix(b.bit_length() - 1, 1).T
    result = []
    for matrix in (left, right):
        size = _padded(len(matrix))
        full = np.zeros((size, size), np.float32)
        full[: len(matrix), : len(matrix)] = matrix
        result.append(torch.from_numpy(full).to(device))
    return result[0], result[1]


def project(
    query: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec: QuantSpec,
    layout: Layout,
    *,
    digits: int = 0,
    per_tile: int = 1,
    unit: float = 1.0,
    dtype: torch.dtype = torch.float16,
) -> Queries:
    """Bring queries (heads, q, dim) into operand order.

    Args:
        query: contiguous, any float dtype.
        shift: (dim,), or (heads, dim), contiguous.
        equalizer: likewise.
        spec: the code.
        layout: order of the channels.
        digits: int8 digits per query, 0 for `dtype` rows.
        per_tile: queries per tile; digits of unused queries of a tile are zero.
        unit: unit of the codebook's digits.
        dtype: of the rows; float16 rows are scaled to a maximum of 1.
    """
    heads, q, dim = query.shape
    rotated_here = spec.rotation == "hadamard" and dim <= MAX_FACTORED_DIM
    offsets = None if shift is None else query.new_empty((heads, q), dtype=torch.float32)
    if rotated_here:
        (a, b), (left, right) = _factors(dim), _hadamard_factors(dim, query.device)
        signs = constants.signs(dim, spec.seed, query.device)
        source = query
    else:
        if shift is not None:
            s = shift.to(torch.float32).reshape(-1, 1, dim)
            offsets = (query.to(torch.float32) * s).sum(-1)
        scaled = equalizer if equalizer is None else equalizer.reshape(-1, 1, dim)
        source = rotate(equalize_query(query, scaled), spec, spec.seed).contiguous()
        a, b, left, right, signs = 1, dim, source, source, source
    tiles = -(-q // per_tile)
    columns = tiles * per_tile * digits if digits else q
    kind = torch.int8 if digits else dtype
    make = torch.empty if layout.width == dim else torch.zeros
    rows = make((heads, columns, layout.width), dtype=kind, device=query.device)
    weights = torch.empty((heads, columns), dtype=torch.float32, device=query.device)
    form: Form = layout.form
    grid = (columns // digits if digits else q, heads)
    a_padded = _padded(a) if rotated_here else 1
    _project[grid](
        source,
        source if equalizer is None else equalizer,
        source if shift is None else shift,
        signs,
        left,
        right,
        decode.position(spec, form, query.device),
        rows,
        weights,
        weights if offsets is None else offsets,
        _head_stride(equalizer, dim),
        _head_stride(shift, dim),
        columns,
        q,
        dim**-0.5,
        DIM=dim,
        WIDTH=layout.width,
        A=a_padded,
        B=_padded(b),
        B_USED=b,
        ROTATE=rotated_here,
        EQUALIZER=rotated_here and equalizer is not None,
        SHIFT=rotated_here and shift is not None,
        DIGITS=digits,
        UNIT=unit,
        NORMALIZE=kind != torch.float32,
        PRECISION="ieee" if dim <= MAX_EXACT_DIM else "tf32x3",
        num_warps=4 if dim <= 4096 else 8,
    )
    return Queries(rows, weights, offsets)


def _head_stride(statistic: torch.Tensor | None, dim: int) -> int:
    """Return the distance of two heads' statistics, 0 where they share one."""
    return 0 if statistic is None or statistic.numel() == dim else dim
