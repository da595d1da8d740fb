"""`dequantize_rows` for dims m * 2^k with m = 12, 20 or 28.

Channel m g + j is number g of tensor j, so the transform is one dense stage across the tensors and
butterflies along each. Codes are loaded where they are needed, in runs of four channels:

    part p of m / 4: a tile (ROWS, 4 G) with channel m g + 4 p + i in column 4 g + i
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.layouts import channel_axis, columns, every_fourth, kernel
from quantforge.ops.kernels.placement import rows_of_program
from quantforge.ops.kernels.rotation import butterfly, dense_stage, four_columns, from_four


@triton.jit
def codes_at(
    row_pointers, byte_stride, channel, mask,
    DIM: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Return int32 codes (ROWS, n) of the channels in a row (1, n) of aligned runs of four."""
    for plane in tl.static_range(len(PLANES)):
        byte = channel % (DIM * PLANES[plane][0] // 8)
        slot = channel // (DIM * PLANES[plane][0] // 8)
        if DIM * PLANES[plane][0] // 8 % 4 == 0:
            byte = tl.max_contiguous(tl.multiple_of(byte, (1, 4)), (1, 4))
        pointers = row_pointers + (byte + PLANES[plane][2]).to(tl.int64) * byte_stride
        if WORDS and DIM * PLANES[plane][0] // 8 % 4 == 0:
            pointers = tl.multiple_of(pointers, (1, 4))
        data = tl.load(pointers, mask=mask & (channel >= 0), other=0).to(tl.int32)
        field = (data >> (slot * PLANES[plane][0])) & ((1 << PLANES[plane][0]) - 1)
        if plane == 0:
            codes = field << PLANES[plane][1]
        else:
            codes = codes | (field << PLANES[plane][1])
    return codes


@triton.jit
def unrotated(
    tiles, ROWS: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SIGNS: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return H^T of vectors in M / 4 tiles (ROWS, 4 G); SIGNS is of the transposed dense stage."""
    group = channel_axis(G, every_fourth(LAYOUT))
    parts = ()
    for part in tl.static_range(M // 4):
        four = four_columns(tiles[part], ROWS, G)
        for i in tl.static_range(4):
            x = columns(four[i], G, every_fourth(LAYOUT))
            parts = parts + (butterfly(x, group, ROWS, G, FIRST_LANE_BIT, LANE_BITS),)
    sums = dense_stage(parts, SIGNS, M)
    result = ()
    for part in tl.static_range(M // 4):
        x = from_four(
            sums[4 * part], sums[4 * part + 1], sums[4 * part + 2], sums[4 * part + 3], ROWS, G
        )
        result = result + (columns(x, 4 * G, LAYOUT),)
    return result


@kernel(do_not_specialize=["n", "heads", "total"])
def dequantize_odd_rows(
    out_ptr, packed_ptr, scales_ptr, shift_ptr, equalizer_ptr,
    signs_ptr, qjl_signs_ptr, centroid_ptr,
    n, heads, total,
    out_batch, out_head, out_row,
    packed_batch, packed_head, packed_row, packed_byte,
    scales_batch, scales_head, scales_row, scales_column,
    shift_batch, shift_head, equalizer_batch, equalizer_head,
    DIM: tl.constexpr, M: tl.constexpr, SIGNS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, PER_ROW: tl.constexpr,
    PLANES: tl.constexpr, QJL_PLANES: tl.constexpr, WORDS: tl.constexpr, INV_SQRT_DIM: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Dequantize rows; arguments as of `dequantize_rows`."""
    G: tl.constexpr = DIM // M
    column = channel_axis(4 * G, LAYOUT)
    run = tl.max_contiguous(tl.multiple_of((column // 4) * M + column % 4, (1, 4)), (1, 4))
    batch, head, row, end = rows_of_program(n, heads, total, ROWS, TILES, PER_ROW, LAYOUT)
    out_rows = out_ptr + batch * out_batch + head * out_head
    packed_rows = packed_ptr + batch * packed_batch + head * packed_head
    scale_rows = scales_ptr + batch * scales_batch + head * scales_head
    if equalizer_ptr is not None:
        equalizer_rows = equalizer_ptr + batch * equalizer_batch + head * equalizer_head
    if shift_ptr is not None:
        shift_rows = shift_ptr + batch * shift_batch + head * shift_head
    for _ in range(TILES):
        mask = row < end
        source = packed_rows + row * packed_row
        scale_source = scale_rows + row * scales_row
        scale = tl.load(scale_source, mask=mask, other=0.0).to(tl.float32)
        tiles = ()
        for part in tl.static_range(M // 4):
            codes = codes_at(source, packed_byte, run + 4 * part, mask, DIM, PLANES, WORDS)
            tiles = tiles + (tl.load(centroid_ptr + codes) * scale,)
        if qjl_signs_ptr is not None:
            left_scale = tl.load(scale_source + scales_column, mask=mask, other=0.0).to(tl.float32)
            left = ()
            for part in tl.static_range(M // 4):
                bits = codes_at(source, packed_byte, run + 4 * part, mask, DIM, QJL_PLANES, WORDS)
                left = left + (2.0 * bits.to(tl.float32) - 1.0,)
            left = unrotated(left, ROWS, G, M, SIGNS, FIRST_LANE_BIT, LANE_BITS, LAYOUT)
            sums = ()
            for part in tl.static_range(M // 4):
                qjl_factor = tl.load(qjl_signs_ptr + run + 4 * part) * INV_SQRT_DIM
                sums = sums + (tiles[part] + left[part] * qjl_factor * left_scale,)
            tiles = sums
        tiles = unrotated(tiles, ROWS, G, M, SIGNS, FIRST_LANE_BIT, LANE_BITS, LAYOUT)
        for part in tl.static_range(M // 4):
            channel = run + 4 * part
            x = tiles[part] * (tl.load(signs_ptr + channel) * INV_SQRT_DIM)
            if equalizer_ptr is not None:
                x = x * tl.load(equalizer_rows + channel).to(tl.float32)
            if shift_ptr is not None:
                x = x + tl.load(shift_rows + channel).to(tl.float32)
            target = out_rows + row * out_row + channel
            tl.store(target, x.to(out_ptr.dtype.element_ty), mask=mask)
        row += ROWS
