"""The kernel that dequantizes rows of a dim that is a power of two.

    packed, scales (batch, heads, n, .)          out (batch, heads, n, dim), contiguous channels
    a program: TILES tiles of ROWS rows of one head, or (PER_ROW) one tile of any rows

Bytes arrive in the layout that codes have before they are packed, so unpacking renames registers.
The transform runs before scale and equalizer are applied, all in float32.
"""

from __future__ import annotations

import triton.language as tl

from quantforge.ops.kernels.layouts import channel_axis, columns, kernel
from quantforge.ops.kernels.packing import load_codes
from quantforge.ops.kernels.placement import rows_of_program
from quantforge.ops.kernels.rotation import butterfly


@kernel(do_not_specialize=["n", "heads", "total"])
def dequantize_rows(
    out_ptr, packed_ptr, scales_ptr, shift_ptr, equalizer_ptr,
    signs_ptr, qjl_signs_ptr, centroid_ptr,
    n, heads, total,
    out_batch, out_head, out_row,
    packed_batch, packed_head, packed_row, packed_byte,
    scales_batch, scales_head, scales_row, scales_column,
    shift_batch, shift_head, equalizer_batch, equalizer_head,
    DIM: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, PER_ROW: tl.constexpr,
    PLANES: tl.constexpr, QJL_PLANES: tl.constexpr, WORDS: tl.constexpr, INV_SQRT_DIM: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Dequantize rows of packed into out.

    Instructions per element at dim 128 and 4 bits, bfloat16, 18 in all: unpack 1-2, centroid 3,
    butterfly 9, scale and signs 2, round 0.5, addresses 1.
    """
    channel = channel_axis(DIM, LAYOUT)
    batch, head, row, end = rows_of_program(n, heads, total, ROWS, TILES, PER_ROW, LAYOUT)
    factor = tl.load(signs_ptr + channel) * INV_SQRT_DIM
    if equalizer_ptr is not None:
        equalizer_rows = equalizer_ptr + batch * equalizer_batch + head * equalizer_head
        factor = factor * tl.load(equalizer_rows + channel).to(tl.float32)
    if shift_ptr is not None:
        shift_rows = shift_ptr + batch * shift_batch + head * shift_head
        shift = tl.load(shift_rows + channel).to(tl.float32)
    if qjl_signs_ptr is not None:
        qjl_factor = tl.load(qjl_signs_ptr + channel) * INV_SQRT_DIM
    out_rows = out_ptr + batch * out_batch + head * out_head + channel
    packed_rows = packed_ptr + batch * packed_batch + head * packed_head
    scale_rows = scales_ptr + batch * scales_batch + head * scales_head
    for _ in range(TILES):
        mask = row < end
        source = packed_rows + row * packed_row
        scale_source = scale_rows + row * scales_row
        scale = tl.load(scale_source, mask=mask, other=0.0).to(tl.float32)
        codes = load_codes(source, packed_byte, mask, ROWS, DIM, PLANES, WORDS, LAYOUT)
        x = tl.load(centroid_ptr + codes)
        if qjl_signs_ptr is None:
            x = butterfly(x, channel, ROWS, DIM, FIRST_LANE_BIT, LANE_BITS) * scale
        else:
            left_scale = tl.load(scale_source + scales_column, mask=mask, other=0.0).to(tl.float32)
            bits = load_codes(source, packed_byte, mask, ROWS, DIM, QJL_PLANES, WORDS, LAYOUT)
            left = 2.0 * bits.to(tl.float32) - 1.0
            left = butterfly(left, channel, ROWS, DIM, FIRST_LANE_BIT, LANE_BITS)
            x = x * scale + left * qjl_factor * left_scale
            x = butterfly(x, channel, ROWS, DIM, FIRST_LANE_BIT, LANE_BITS)
        x = x * factor
        if shift_ptr is not None:
            x = x + shift
        target = out_rows + row * out_row
        tl.store(target, columns(x, DIM, LAYOUT).to(out_ptr.dtype.element_ty), mask=mask)
        row += ROWS
