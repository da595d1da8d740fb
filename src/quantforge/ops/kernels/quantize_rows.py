"""The kernel that quantizes rows, for `quantize` and `cache_append` alike.

    x (batch, heads, n, dim), any strides        packed, scales (batch, heads, capacity, .)
    a program: TILES tiles of ROWS rows of one head, or (PER_ROW) one tile of any rows

The input is read once: a tile stays in registers from the load to the bytes. The next tile is
loaded before this one is encoded. Instructions per element at dim 128 and 4 bits, bfloat16:

    convert with signs                         1.5      square, sum, shuffles                3
    butterfly (5 bits in registers, 2 in lanes)  9      times 1 / norm                       1
    code and centroid                            6      product, sum, shuffles               3
    pack                                         1      scalars of a row, addresses        2.5

4.6 of these 27 are shuffles, of which a multiprocessor does one while it issues four instructions.
Maxima and powers of two are computed only where a sum of squares is out of the ordinary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.codebook import lookup_table, nearest
from quantforge.ops.kernels.encode import (
    power_of_two,
    reciprocal,
    scale_factor,
    some_are_extreme,
    tree_sum,
    widened,
)
from quantforge.ops.kernels.layouts import channel_axis, kernel
from quantforge.ops.kernels.packing import store_codes
from quantforge.ops.kernels.placement import rows_of_program
from quantforge.ops.kernels.rotation import butterfly


@triton.jit
def encode_tile(
    v, signs_qjl, channel, table, packed_rows, scale_rows, scale_column, mask,
    DIM: tl.constexpr, ROWS: tl.constexpr,
    PLANES: tl.constexpr, QJL_PLANES: tl.constexpr, WORDS: tl.constexpr, RULE: tl.constexpr,
    SLOPE: tl.constexpr, CELLS: tl.constexpr,
    SQRT_DIM: tl.constexpr, INV_SQRT_DIM: tl.constexpr, QJL_FACTOR: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Encode and store a tile v (ROWS, DIM) of prepared vectors, signs of the rotation included.

    `packed_rows`, `scale_rows` and `mask` are columns (ROWS, 1).
    """
    squares = tree_sum(v * v, ROWS, DIM, LAYOUT)
    power = tl.where(squares >= 0.0, 1.0, 1.0)
    if some_are_extreme(squares, LAYOUT):
        power, inverse_power = power_of_two(v, LAYOUT)
        v = v * inverse_power
        squares = tree_sum(v * v, ROWS, DIM, LAYOUT)
    norm = tl.sqrt_rn(squares)
    inverse_norm = reciprocal(norm)
    u = butterfly(v, channel, ROWS, DIM, FIRST_LANE_BIT, LANE_BITS) * inverse_norm
    codes, c = nearest(u, table, SLOPE, CELLS)
    store_codes(codes, packed_rows, mask, ROWS, DIM, PLANES, WORDS, LAYOUT)
    scale = norm * INV_SQRT_DIM * scale_factor(u, c, RULE, DIM, ROWS, LAYOUT) * power
    scale = scale.to(scale_rows.dtype.element_ty)
    tl.store(scale_rows, scale, mask=mask)
    if QJL_PLANES is not None:
        stored = scale.to(tl.float32) * tl.div_rn(1.0, power)
        stored = stored * (inverse_norm * SQRT_DIM)
        left = u - stored * c
        turned = butterfly(left * signs_qjl, channel, ROWS, DIM, FIRST_LANE_BIT, LANE_BITS)
        positive = (turned > 0.0).to(tl.int32)
        store_codes(positive, packed_rows, mask, ROWS, DIM, QJL_PLANES, WORDS, LAYOUT)
        left_norm = tl.sqrt_rn(tree_sum(left * left, ROWS, DIM, LAYOUT))
        left_scale = left_norm * norm * QJL_FACTOR * power
        left_scale = left_scale.to(scale_rows.dtype.element_ty)
        tl.store(scale_rows + scale_column, left_scale, mask=mask)


@kernel(do_not_specialize=["position", "n", "heads", "total", "capacity"])
def quantize_rows(
    x_ptr, packed_ptr, scales_ptr, position_ptr, shift_ptr, equalizer_ptr,
    signs_ptr, qjl_signs_ptr, table_ptr,
    position, n, heads, total, capacity,
    x_batch, x_head, x_row, x_channel,
    packed_batch, packed_head, packed_row, scales_batch, scales_head, scales_row, scales_column,
    shift_batch, shift_head, equalizer_batch, equalizer_head,
    DIM: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, PER_ROW: tl.constexpr,
    PLANES: tl.constexpr, QJL_PLANES: tl.constexpr, WORDS: tl.constexpr, RULE: tl.constexpr,
    SLOPE: tl.constexpr, CELLS: tl.constexpr,
    SQRT_DIM: tl.constexpr, INV_SQRT_DIM: tl.constexpr, QJL_FACTOR: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Quantize rows of x into rows `position ..` of packed and scales. `total` counts all rows."""
    BY_PAIRS: tl.constexpr = LAYOUT is not None and x_ptr.dtype.element_ty == tl.bfloat16
    channel = channel_axis(DIM, LAYOUT)
    batch, head, row, end = rows_of_program(n, heads, total, ROWS, TILES, PER_ROW, LAYOUT)
    if position_ptr is not None:
        start = tl.load(position_ptr)
    else:
        start = position
    table = lookup_table(table_ptr, CELLS)
    signs = tl.load(signs_ptr + channel)
    signs_qjl = signs
    if qjl_signs_ptr is not None:
        signs_qjl = tl.load(qjl_signs_ptr + channel)
    flips = None
    if BY_PAIRS and shift_ptr is None and equalizer_ptr is None:
        flips = signs.to(tl.bfloat16).to(tl.int16, bitcast=True) & -(2**15)
    factor = signs
    if equalizer_ptr is not None:
        equalizer_rows = equalizer_ptr + batch * equalizer_batch + head * equalizer_head
        factor = tl.div_rn(1.0, tl.load(equalizer_rows + channel).to(tl.float32)) * signs
    if shift_ptr is not None:
        shift_rows = shift_ptr + batch * shift_batch + head * shift_head
        shift = tl.load(shift_rows + channel).to(tl.float32)
    x_rows = x_ptr + batch * x_batch + head * x_head + channel.to(tl.int64) * x_channel
    packed_rows = packed_ptr + batch * packed_batch + head * packed_head
    scale_rows = scales_ptr + batch * scales_batch + head * scales_head
    x = tl.load(x_rows + row * x_row, mask=row < end, other=0.0)
    for tile in range(TILES):
        if BY_PAIRS:
            v = widened(x, flips)
        else:
            v = x.to(tl.float32)
        following = row + ROWS
        wanted = (following < end) & (tile + 1 < TILES)
        x = tl.load(x_rows + following * x_row, mask=wanted, other=0.0)  # into registers just read
        if shift_ptr is not None:
            v = v - shift
        if flips is None:
            v = v * factor
        target = start + row
        mask = (row < end) & (target >= 0) & (target < capacity)
        encode_tile(
            v, signs_qjl, channel, table,
            packed_rows + target * packed_row, scale_rows + target * scales_row, scales_column,
            mask, DIM, ROWS, PLANES, QJL_PLANES, WORDS, RULE, SLOPE, CELLS,
            SQRT_DIM, INV_SQRT_DIM, QJL_FACTOR, FIRST_LANE_BIT, LANE_BITS, LAYOUT,
        )  # fmt: skip
        row = following
