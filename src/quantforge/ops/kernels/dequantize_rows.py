"""The kernel that dequantizes rows in float32: any dtype, dim and GPU, with the QJL residual.

    packed, scales (batch, heads, n, .)          out (batch, heads, n, dim), contiguous channels
    a program: TILES tiles of ROWS rows of one head, or (PER_ROW) one tile of any rows

A vector is M runs of G = dim / M channels, M being 1 for a power of two. Bytes arrive in the layout
that codes have before they are packed, so unpacking renames registers. Scale and equalizer are
applied after the transform.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.codebook import centroids_in_lanes, centroids_of_runs
from quantforge.ops.kernels.layouts import channel_axis, columns, kernel
from quantforge.ops.kernels.packing import load_runs
from quantforge.ops.kernels.placement import rows_of_program
from quantforge.ops.kernels.rotation import transform


@triton.jit
def with_residual(
    parts, source, packed_byte, mask, scale, left_scale, factor_ptr, column,
    ROWS: tl.constexpr, M: tl.constexpr, G: tl.constexpr, DENSE: tl.constexpr,
    PLANES: tl.constexpr, WORDS: tl.constexpr, INV_SQRT_DIM: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return `scale c + left_scale P^T signs` of parts c; `factor_ptr` holds the signs of P."""
    bits = load_runs(source, packed_byte, mask, ROWS, M, G, PLANES, True, WORDS, LAYOUT)
    left = ()
    for j in tl.static_range(M):
        left = left + (2.0 * bits[j].to(tl.float32) - 1.0,)
    left = transform(left, column, ROWS, G, DENSE, FIRST_LANE_BIT, LANE_BITS)
    sums = ()
    for j in tl.static_range(M):
        factor = tl.load(factor_ptr + column + j * G) * INV_SQRT_DIM
        sums = sums + (parts[j] * scale + left[j] * factor * left_scale,)
    return sums


@kernel(do_not_specialize=["n", "heads", "total"])
def dequantize_rows(
    out_ptr, packed_ptr, scales_ptr, shift_ptr, equalizer_ptr,
    signs_ptr, qjl_signs_ptr, centroid_ptr,
    n, heads, total,
    out_batch, out_head, out_row,
    packed_batch, packed_head, packed_row, packed_byte,
    scales_batch, scales_head, scales_row, scales_column,
    shift_batch, shift_head, equalizer_batch, equalizer_head,
    DIM: tl.constexpr, M: tl.constexpr, DENSE: tl.constexpr, ROTATED: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, PER_ROW: tl.constexpr,
    PLANES: tl.constexpr, QJL_PLANES: tl.constexpr, IN_LANES: tl.constexpr, WORDS: tl.constexpr,
    INV_SQRT_DIM: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Dequantize rows of packed into out; with ROTATED in the rotated basis.

    Instructions per element at dim 128 and 4 bits: unpack 1, centroid 1 (a shuffle), butterfly 9,
    scale and signs 2, addresses 1.
    """
    G: tl.constexpr = DIM // M
    column = channel_axis(G, LAYOUT)
    batch, head, row, end = rows_of_program(n, heads, total, ROWS, TILES, PER_ROW, LAYOUT)
    out_rows = out_ptr + batch * out_batch + head * out_head + column
    packed_rows = packed_ptr + batch * packed_batch + head * packed_head
    scale_rows = scales_ptr + batch * scales_batch + head * scales_head
    if equalizer_ptr is not None:
        equalizer_rows = equalizer_ptr + batch * equalizer_batch + head * equalizer_head
    if shift_ptr is not None:
        shift_rows = shift_ptr + batch * shift_batch + head * shift_head
    table = centroid_ptr
    if IN_LANES:
        table = centroids_in_lanes(centroid_ptr)
    for _ in range(TILES):
        mask = row < end
        source = packed_rows + row * packed_row
        scale_source = scale_rows + row * scales_row
        scale = tl.load(scale_source, mask=mask, other=0.0).to(tl.float32)
        codes = load_runs(
            source, packed_byte, mask, ROWS, M, G, PLANES, not IN_LANES, WORDS, LAYOUT
        )  # fmt: skip
        parts = centroids_of_runs(codes, table, IN_LANES)
        if qjl_signs_ptr is not None:
            left_scale = tl.load(scale_source + scales_column, mask=mask, other=0.0).to(tl.float32)
            parts = with_residual(
                parts, source, packed_byte, mask, scale, left_scale, qjl_signs_ptr, column,
                ROWS, M, G, DENSE, QJL_PLANES, WORDS, INV_SQRT_DIM,
                FIRST_LANE_BIT, LANE_BITS, LAYOUT,
            )  # fmt: skip
        if not ROTATED:
            parts = transform(parts, column, ROWS, G, DENSE, FIRST_LANE_BIT, LANE_BITS)
        for j in tl.static_range(M):
            x = parts[j]
            if qjl_signs_ptr is None:
                x = x * scale
            if not ROTATED:
                x = x * (tl.load(signs_ptr + column + j * G) * INV_SQRT_DIM)
            if equalizer_ptr is not None:
                x = x * tl.load(equalizer_rows + column + j * G).to(tl.float32)
            if shift_ptr is not None:
                x = x + tl.load(shift_rows + column + j * G).to(tl.float32)
            target = out_rows + row * out_row + j * G
            tl.store(target, columns(x, G, LAYOUT).to(out_ptr.dtype.element_ty), mask=mask)
        row += ROWS
