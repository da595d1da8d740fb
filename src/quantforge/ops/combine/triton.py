"""Weighted sums by a fused kernel: rows are read once, decoded in registers and never written.

    program     a tile of bytes of the base plane, QUERIES rows of weights, a range of rows
    rows        n on the contraction axis of the dot, weights times scales on M, channels on N
    sums        one accumulator (QUERIES, TILE) per field of a byte

Ranges of rows give partial sums, which torch adds and rotates back: rotation is linear. Codes are
looked up in a table (5-7 instructions a code); three tf32 products give float32 accuracy, so that
weights times scales cannot leave the range of fp16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quantforge.ops.kernels import decode
from quantforge.ops.kernels.products import gather
from quantforge.ops.kernels.rows import Product, product_of, reason_against
from quantforge.ops.launch import multiprocessors
from quantforge.ops.statistics import restore
from quantforge.ops.transform import unrotate
from quantforge.spec import QuantSpec


@dataclass(frozen=True)
class Tuning:
    """Shape of the kernel: weights and rows per step, least rows per program."""

    queries: int
    rows: int
    warps: int
    least_rows: int


# untuned
TUNING = Tuning(queries=16, rows=32, warps=4, least_rows=256)


def supports(
    weights: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> str | None:
    """Return why these arguments are not for the kernel, or None."""
    return reason_against(weights, packed, scales, QuantSpec.from_key(spec_key))


def combine(
    weights: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> torch.Tensor:
    """Implement `quantforge::combine`."""
    spec = QuantSpec.from_key(spec_key)
    lead = torch.broadcast_shapes(weights.shape[:-2], packed.shape[:-2])
    shape = (*lead, weights.shape[-2], spec.dim)
    if 0 in (*shape, packed.shape[-2]):
        return weights.new_zeros(shape)
    p = product_of(weights, packed, scales, shift, equalizer, spec)
    with torch.cuda.device_of(packed):  # models may be spread over several GPUs
        x = unrotate(_sums(p), spec, spec.seed)
    statistics = [None if t is None else t.unsqueeze(-2) for t in (p.shift, p.equalizer)]
    mass = None if shift is None else p.query.sum(-1, keepdim=True, dtype=torch.float32)
    return restore(x, statistics[0], statistics[1], mass).to(weights.dtype).view(shape)


@triton.jit
def _combine_rows(
    weights, packed, scales, table, sums,
    n, q, heads, per_split,
    stride_p0, stride_p1, stride_p, stride_s0, stride_s1, stride_s,
    DIM: tl.constexpr, STRIDE: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, PLANES: tl.constexpr, ALIGNMENT: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write partial sums (splits, heads, q, PARTS * PADDED) of decoded rows times weights."""
    TILES: tl.constexpr = PADDED // TILE
    split = (tl.program_id(0) // TILES).to(tl.int64)
    start = tl.program_id(0) % TILES * TILE
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    head = tl.program_id(2).to(tl.int64)
    packed += ((head // heads) * stride_p0 + (head % heads) * stride_p1) * ALIGNMENT
    packed = tl.multiple_of(packed, ALIGNMENT)
    scales += (head // heads) * stride_s0 + (head % heads) * stride_s1
    columns = tl.arange(0, TILE)[None, :]
    first = split * per_split
    last = tl.minimum(first + per_split, n)
    line = head * q + query
    totals = (tl.zeros((QUERIES, TILE), tl.float32),) * PARTS
    for begin in tl.range(first, last, ROWS):
        rows = begin + tl.arange(0, ROWS)
        live = rows < last
        inside = live[:, None] & (start + columns < STRIDE)
        row = packed + rows[:, None] * stride_p * ALIGNMENT
        base = tl.load(row + start + columns, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + rows * stride_s, mask=live, other=0.0).to(tl.float32)
        weight = tl.load(
            weights + line[:, None] * n + rows[None, :],
            mask=(query < q)[:, None] & live[None, :],
            other=0.0,
        )
        weight = weight.to(tl.float32) * scale[None, :]  # (QUERIES, ROWS)
        new = ()
        for part in tl.static_range(PARTS):
            channel = start + columns + part * STRIDE
            value = gather(
                row, base, inside & (channel < DIM), channel, table, part, PLANES, PLANES[0][0]
            )  # (ROWS, TILE)
            new = new + (tl.dot(weight, value, totals[part], input_precision="tf32x3"),)
        totals = new
    target = sums + ((split * tl.num_programs(2) + head) * q + query)[:, None] * (PARTS * PADDED)
    for part in tl.static_range(PARTS):
        place = target + part * PADDED + start + columns
        tl.store(place, totals[part], mask=(query < q)[:, None])


def _sums(p: Product) -> torch.Tensor:
    """Return weighted sums of rotated rows, (heads, q, dim) float32."""
    (heads, q), spec = p.query.shape[:2], p.spec
    layout = decode.layout_of(spec, "table")
    device = p.query.device
    query_tiles = -(-q // TUNING.queries)
    tiles = layout.padded // layout.tile
    splits, wanted = 1, 4 * multiprocessors(device)
    while splits * tiles * query_tiles * heads < wanted and p.n > 2 * splits * TUNING.least_rows:
        splits *= 2
    per_split = -(-p.n // (splits * TUNING.rows)) * TUNING.rows
    sums = torch.empty((splits, heads, q, layout.width), dtype=torch.float32, device=device)
    alignment = p.rows.alignment
    _combine_rows[(splits * tiles, query_tiles, heads)](
        p.query,
        p.rows.packed,
        p.rows.scales,
        decode.tables(spec, "table", 0, device),
        sums,
        p.n,
        q,
        p.rows.heads[1],
        per_split,
        *(stride // alignment for stride in p.rows.strides[0]),
        *p.rows.strides[1],
        DIM=spec.dim,
        STRIDE=layout.stride,
        PADDED=layout.padded,
        PARTS=layout.parts,
        TILE=layout.tile,
        PLANES=decode.plane_fields(spec),
        ALIGNMENT=alignment,
        QUERIES=TUNING.queries,
        ROWS=TUNING.rows,
        num_warps=TUNING.warps,
    )
    total = sums[0] if splits == 1 else sums.sum(0)
    return total.index_select(-1, decode.position(spec, "table", device))
