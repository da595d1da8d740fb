"""The kernel that dequantizes rows to half precision, two numbers to a word.

    packed, scales (batch, heads, n, .)      out (batch, heads, n, dim / 2) words, contiguous
    a program: TILES tiles of ROWS rows of one head, or (PER_ROW) one tile of any rows

A vector is M runs of G = dim / M channels, M being 1 for a power of two. Centroids lie in the lanes
of the warp and become fp16 words, words are transformed (`halves`), results are scaled in float32.
Instructions per element at 4 bits, bfloat16, without statistics:

    unpack, look up           2, of which one is a shuffle
    round to fp16             0.5
    transform                 5 at dim 128, 7 at 768: half of what float32 takes
    widen, scale, round       2.5
    flip signs, store, rest   1.5
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels import halves
from quantforge.ops.kernels.codebook import centroids_in_lanes, centroids_of_runs
from quantforge.ops.kernels.layouts import channel_axis, every_second, kernel
from quantforge.ops.kernels.packing import load_runs
from quantforge.ops.kernels.placement import rows_of_program


@triton.jit
def statistic_pairs(rows, channel, ROWS: tl.constexpr, G: tl.constexpr, LAYOUT: tl.constexpr):
    """Load a statistic (ROWS, G) of one run as float32 of its even and its odd channels."""
    return halves.pairs(tl.load(rows + channel).to(tl.float32), ROWS, G, LAYOUT)


@kernel(do_not_specialize=["n", "heads", "total"])
def dequantize_words(
    out_ptr, packed_ptr, scales_ptr, shift_ptr, equalizer_ptr, flips_ptr, centroid_ptr,
    n, heads, total,
    out_batch, out_head, out_row,
    packed_batch, packed_head, packed_row, packed_byte,
    scales_batch, scales_head, scales_row,
    shift_batch, shift_head, equalizer_batch, equalizer_head,
    DIM: tl.constexpr, M: tl.constexpr, DENSE: tl.constexpr, ROTATED: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, PER_ROW: tl.constexpr,
    PLANES: tl.constexpr, IN_LANES: tl.constexpr, WORDS: tl.constexpr,
    INV_SQRT_DIM: tl.constexpr, BFLOAT16: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Dequantize rows of packed into out; `out_ptr` and `flips_ptr` count words.

    With ROTATED the result is `scale * centroid`, the vector in the rotated basis.
    """
    G: tl.constexpr = DIM // M
    STATISTICS: tl.constexpr = ROWS if PER_ROW else 1
    channel = channel_axis(G, LAYOUT)
    pair = channel_axis(G // 2, every_second(LAYOUT))
    batch, head, row, end = rows_of_program(n, heads, total, ROWS, TILES, PER_ROW, LAYOUT)
    word_batch, word_head, word_row, word_end = rows_of_program(
        n, heads, total, ROWS, TILES, PER_ROW, every_second(LAYOUT)
    )
    out_rows = out_ptr + word_batch * out_batch + word_head * out_head + pair
    packed_rows = packed_ptr + batch * packed_batch + head * packed_head
    scale_rows = scales_ptr + word_batch * scales_batch + word_head * scales_head
    if equalizer_ptr is not None:
        equalizer_rows = equalizer_ptr + batch * equalizer_batch + head * equalizer_head
    if shift_ptr is not None:
        shift_rows = shift_ptr + batch * shift_batch + head * shift_head
    factors, shifts = (0.0, 0.0), (0.0, 0.0)
    if M == 1:  # they stay in registers
        if equalizer_ptr is not None:
            factors = statistic_pairs(equalizer_rows, channel, STATISTICS, G, LAYOUT)
        if shift_ptr is not None:
            shifts = statistic_pairs(shift_rows, channel, STATISTICS, G, LAYOUT)
    table = centroid_ptr
    if IN_LANES:
        table = centroids_in_lanes(centroid_ptr)
    for _ in range(TILES):
        inside = word_row < word_end
        scale = tl.load(scale_rows + word_row * scales_row, mask=inside, other=0.0).to(tl.float32)
        if not ROTATED:
            scale = scale * INV_SQRT_DIM
        codes = load_runs(
            packed_rows + row * packed_row, packed_byte, row < end,
            ROWS, M, G, PLANES, not IN_LANES, WORDS, LAYOUT,
        )  # fmt: skip
        parts = halves.rounded_runs(centroids_of_runs(codes, table, IN_LANES), ROWS, G, LAYOUT)
        if not ROTATED:
            parts = halves.transform(parts, ROWS, G, DENSE, FIRST_LANE_BIT, LANE_BITS)
        target = out_rows + word_row * out_row
        for j in tl.static_range(M):
            words = parts[j]
            if not ROTATED:  # fp16 and bfloat16 have their signs in the same place
                words = words ^ tl.load(flips_ptr + pair + j * (G // 2))
            low, high = halves.widened(words)
            low, high = low * scale, high * scale
            if equalizer_ptr is not None:
                if M > 1:  # names of their own: a name bound before the loop is carried by it
                    run = statistic_pairs(equalizer_rows, channel + j * G, STATISTICS, G, LAYOUT)
                    low, high = low * run[0], high * run[1]
                else:
                    low, high = low * factors[0], high * factors[1]
            if shift_ptr is not None:
                if M > 1:
                    moved = statistic_pairs(shift_rows, channel + j * G, STATISTICS, G, LAYOUT)
                    low, high = low + moved[0], high + moved[1]
                else:
                    low, high = low + shifts[0], high + shifts[1]
            tl.store(target + j * (G // 2), halves.rounded_to(low, high, BFLOAT16), mask=inside)
        row += ROWS
        word_row += ROWS
