"""`quantize_rows` for dims m * 2^k with m = 12, 20 or 28.

A vector is m runs of G = 2^k channels, each a tensor (ROWS, G) of one layout: m numbers of a
thread, a run apart, go through the dense stage, and a run is transformed, summed and packed like
the vector of a power of two. A field of 4 or 2 bits shares its byte with others whole runs away; a
field of one bit with some half a run away, so then the upper bit of a column numbers registers.

Instructions per element at dim 768 and 4 bits, bfloat16, 8 channels by 12 runs in a thread:

    convert, flip signs         2      code and centroid        6
    square, sum                 2.5    product, sum             2.5
    dense stage                 4.3    pack                     1
    butterfly (3 + 3 bits)      9      scalars, addresses       1.5
    times 1 / norm              1

of these 30 (2 more at dim 1536) 5.5 are shuffles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.codebook import lookup_table, nearest
from quantforge.ops.kernels.encode import (
    product_of_runs,
    reciprocal,
    scale_factor_of_runs,
    scaling,
    some_are_extreme,
    widened,
)
from quantforge.ops.kernels.layouts import channel_axis, kernel, per_row
from quantforge.ops.kernels.packing import store_runs
from quantforge.ops.kernels.placement import rows_of_program
from quantforge.ops.kernels.rotation import transform


@triton.jit
def peak_of_runs(parts, LAYOUT: tl.constexpr):
    """Return the greatest magnitudes of vectors in runs, (ROWS, 1)."""
    peak = tl.abs(parts[0])
    for j in tl.static_range(1, len(parts)):
        peak = tl.maximum(peak, tl.abs(parts[j]))
    return per_row(tl.max(peak, axis=1), LAYOUT)


@kernel(do_not_specialize=["position", "n", "heads", "total", "capacity"])
def quantize_odd_rows(
    x_ptr, packed_ptr, scales_ptr, position_ptr, shift_ptr, inverse_ptr, signs_ptr, flips_ptr,
    table_ptr,
    position, n, heads, total, capacity,
    x_batch, x_head, x_row, x_channel,
    packed_batch, packed_head, packed_row, scales_batch, scales_head, scales_row,
    shift_batch, shift_head, inverse_batch, inverse_head,
    DIM: tl.constexpr, M: tl.constexpr, DENSE: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, PER_ROW: tl.constexpr,
    PLANES: tl.constexpr, WORDS: tl.constexpr, RULE: tl.constexpr,
    SLOPE: tl.constexpr, CELLS: tl.constexpr, INV_SQRT_DIM: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Quantize rows of x into rows `position ..`; `inverse_ptr` holds 1 / equalizer."""
    G: tl.constexpr = DIM // M
    IS_PLAIN: tl.constexpr = shift_ptr is None and inverse_ptr is None
    BY_PAIRS: tl.constexpr = LAYOUT is not None and x_ptr.dtype.element_ty == tl.bfloat16
    column = channel_axis(G, LAYOUT)
    batch, head, row, end = rows_of_program(n, heads, total, ROWS, TILES, PER_ROW, LAYOUT)
    if position_ptr is not None:
        start = tl.load(position_ptr)
    else:
        start = position
    x_rows = x_ptr + batch * x_batch + head * x_head
    if shift_ptr is not None:
        shift_rows = shift_ptr + batch * shift_batch + head * shift_head
    if inverse_ptr is not None:
        inverse_rows = inverse_ptr + batch * inverse_batch + head * inverse_head
    packed_rows = packed_ptr + batch * packed_batch + head * packed_head
    scale_rows = scales_ptr + batch * scales_batch + head * scales_head
    table = lookup_table(table_ptr, CELLS)
    for _ in range(TILES):
        parts = ()
        for j in tl.static_range(M):
            channel = column + j * G
            pointers = x_rows + row * x_row + channel.to(tl.int64) * x_channel
            x = tl.load(pointers, mask=row < end, other=0.0)
            if BY_PAIRS and IS_PLAIN:
                v = widened(x, tl.load(flips_ptr + channel))
            else:
                v = x.to(tl.float32)
                if shift_ptr is not None:
                    v = v - tl.load(shift_rows + channel).to(tl.float32)
                if inverse_ptr is not None:
                    v = v * tl.load(inverse_rows + channel)
                v = v * tl.load(signs_ptr + channel)
            parts = parts + (v,)
        squares = product_of_runs(parts, parts, ROWS, G, LAYOUT)
        power = tl.where(squares >= 0.0, 1.0, 1.0)
        if some_are_extreme(squares, LAYOUT):
            power, inverse_power = scaling(peak_of_runs(parts, LAYOUT))
            scaled = ()
            for j in tl.static_range(M):
                scaled = scaled + (parts[j] * inverse_power,)
            parts = scaled
            squares = product_of_runs(parts, parts, ROWS, G, LAYOUT)
        norm = tl.sqrt_rn(squares)
        inverse_norm = reciprocal(norm)
        turned = transform(parts, column, ROWS, G, DENSE, FIRST_LANE_BIT, LANE_BITS)
        units, codes, centroids = (), (), ()
        for j in tl.static_range(M):
            u = turned[j] * inverse_norm
            code, c = nearest(u, table, SLOPE, CELLS)
            units, codes, centroids = units + (u,), codes + (code,), centroids + (c,)
        target = start + row
        mask = (row < end) & (target >= 0) & (target < capacity)
        store_runs(
            codes, packed_rows + target * packed_row, mask, ROWS, G, PLANES, WORDS, LAYOUT
        )  # fmt: skip
        factor = scale_factor_of_runs(units, centroids, RULE, DIM, ROWS, G, LAYOUT)
        scale = norm * INV_SQRT_DIM * factor * power
        scale = scale.to(scales_ptr.dtype.element_ty)
        tl.store(scale_rows + target * scales_row, scale, mask=mask)
        row += ROWS
