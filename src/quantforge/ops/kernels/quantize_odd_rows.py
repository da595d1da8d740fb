"""`quantize_rows` for dims m * 2^k with m = 12, 20 or 28.

The definition walks a vector in two orders that no power of two brings together:

    sums and bytes     channel c                in a tile (ROWS, 2^j) whose last columns are empty
    rotation           channel m g + j          as m tensors (ROWS, 2^k), one for each j

So a tile is loaded twice, the second time from L1: once flat for the norm, once in runs of four
channels for the rotation. Rotated vectors go back to the flat order through shared memory, columns
`padded g + j` gathered at `padded (c / m) + c % m`. All of the rest is as in `quantize_rows`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.codebook import lookup_table, nearest
from quantforge.ops.kernels.encode import (
    power_from_peak,
    power_of_two,
    reciprocal,
    scale_factor,
    tree_sum,
)
from quantforge.ops.kernels.layouts import channel_axis, columns, every_fourth, kernel, per_row
from quantforge.ops.kernels.packing import store_codes
from quantforge.ops.kernels.placement import rows_of_program
from quantforge.ops.kernels.rotation import butterfly, dense_stage, four_columns, interleaved


@triton.jit
def prepared(
    x_rows, x_channel, shift_rows, inverse_rows, channel, mask, column_mask,
):  # fmt: skip
    """Load `(x - shift) * inverse` at some channels, float32 and zero outside the masks."""
    pointers = x_rows + channel.to(tl.int64) * x_channel
    v = tl.load(pointers, mask=mask & column_mask, other=0.0).to(tl.float32)
    if shift_rows is not None:
        v = v - tl.load(shift_rows + channel, mask=column_mask, other=0.0).to(tl.float32)
    if inverse_rows is not None:
        v = v * tl.load(inverse_rows + channel, mask=column_mask, other=0.0)
    return v


@triton.jit
def rotated(
    x_rows, x_channel, shift_rows, inverse_rows, signs_ptr, mask,
    ROWS: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr,
    SIGNS: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return sqrt(d) R v / 2^floor(log2 max|v|), column `padded g + j` for channel `m g + j`.

    LAYOUT is of a tile (ROWS, 4 G), four channels of a run side by side.
    """
    G: tl.constexpr = DIM // M
    column = channel_axis(4 * G, LAYOUT)
    run = (column // 4) * M + column % 4
    run = tl.max_contiguous(tl.multiple_of(run, (1, 4)), (1, 4))
    always = column >= 0
    loaded = ()
    for part in tl.static_range(M // 4):
        channel = run + 4 * part
        v = prepared(x_rows, x_channel, shift_rows, inverse_rows, channel, mask, always)
        loaded = loaded + (v,)
        peak = tl.max(tl.abs(v), axis=1)
        if part == 0:
            highest = peak
        else:
            highest = tl.maximum(highest, peak)
    _, inverse_power = power_from_peak(per_row(highest, LAYOUT))
    parts = ()
    for part in tl.static_range(M // 4):
        v = loaded[part] * inverse_power * tl.load(signs_ptr + run + 4 * part)
        parts = parts + four_columns(v, ROWS, G)
    group = channel_axis(G, every_fourth(LAYOUT))
    turned = ()
    sums = dense_stage(parts, SIGNS, M)
    for j in tl.static_range(M):
        x = columns(sums[j], G, every_fourth(LAYOUT))
        turned = turned + (butterfly(x, group, ROWS, G, FIRST_LANE_BIT, LANE_BITS),)
    return interleaved(turned, ROWS, G, M, PADDED)


@kernel(do_not_specialize=["position", "n", "heads", "total", "capacity"])
def quantize_odd_rows(
    x_ptr, packed_ptr, scales_ptr, position_ptr, shift_ptr, inverse_ptr, signs_ptr, table_ptr,
    position, n, heads, total, capacity,
    x_batch, x_head, x_row, x_channel,
    packed_batch, packed_head, packed_row, scales_batch, scales_head, scales_row,
    shift_batch, shift_head, inverse_batch, inverse_head,
    DIM: tl.constexpr, N: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, PER_ROW: tl.constexpr,
    PLANES: tl.constexpr, WORDS: tl.constexpr, RULE: tl.constexpr,
    SLOPE: tl.constexpr, CELLS: tl.constexpr,
    INV_SQRT_DIM: tl.constexpr, SIGNS: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr,
    LAYOUT: tl.constexpr, RUN_LAYOUT: tl.constexpr,
):  # fmt: skip
    """Quantize rows of x into rows `position ..`; `inverse_ptr` holds 1 / equalizer."""
    channel = channel_axis(N, LAYOUT)
    is_channel = channel < DIM
    source = tl.where(is_channel, (channel // M) * PADDED + channel % M, 0)
    batch, head, row, end = rows_of_program(n, heads, total, ROWS, TILES, PER_ROW, LAYOUT)
    run_batch, run_head, run_row, run_end = rows_of_program(
        n, heads, total, ROWS, TILES, PER_ROW, RUN_LAYOUT
    )
    if position_ptr is not None:
        start = tl.load(position_ptr)
    else:
        start = position
    x_rows = x_ptr + batch * x_batch + head * x_head
    run_rows = x_ptr + run_batch * x_batch + run_head * x_head
    shift_rows, run_shift, inverse_rows, run_inverse = None, None, None, None
    if shift_ptr is not None:
        shift_rows = shift_ptr + batch * shift_batch + head * shift_head
        run_shift = shift_ptr + run_batch * shift_batch + run_head * shift_head
    if inverse_ptr is not None:
        inverse_rows = inverse_ptr + batch * inverse_batch + head * inverse_head
        run_inverse = inverse_ptr + run_batch * inverse_batch + run_head * inverse_head
    packed_rows = packed_ptr + batch * packed_batch + head * packed_head
    scale_rows = scales_ptr + batch * scales_batch + head * scales_head
    table = lookup_table(table_ptr, CELLS)
    for _ in range(TILES):
        v = prepared(
            x_rows + row * x_row, x_channel, shift_rows, inverse_rows,
            channel, row < end, is_channel,
        )  # fmt: skip
        power, inverse_power = power_of_two(v, LAYOUT)
        v = v * inverse_power
        norm = tl.sqrt_rn(tree_sum(v * v, is_channel, ROWS, N, LAYOUT))
        turned = rotated(
            run_rows + run_row * x_row, x_channel, run_shift, run_inverse, signs_ptr,
            run_row < run_end, ROWS, DIM, M, PADDED, SIGNS,
            FIRST_LANE_BIT, LANE_BITS, RUN_LAYOUT,
        )  # fmt: skip
        index = (row * 0).to(tl.int32) + source
        u = tl.gather(turned, index, 1) * reciprocal(norm)
        codes, c = nearest(u, table, SLOPE, CELLS)
        target = start + row
        mask = (row < end) & (target >= 0) & (target < capacity)
        store_codes(
            codes, packed_rows + target * packed_row, mask,
            ROWS, N, DIM, M // 4, PLANES, WORDS, LAYOUT,
        )  # fmt: skip
        factor = scale_factor(u, c, is_channel, RULE, DIM, ROWS, N, LAYOUT)
        scale = norm * INV_SQRT_DIM * factor * power
        scale = scale.to(scales_ptr.dtype.element_ty)
        tl.store(scale_rows + target * scales_row, scale, mask=mask)
        row += ROWS
        run_row += ROWS
