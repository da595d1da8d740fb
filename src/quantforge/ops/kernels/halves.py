"""Two fp16 numbers to a word: a transform that need not be exact, at half of the instructions.

A word (int32) holds channels 2 i and 2 i + 1, the first in its low half. Fp16 keeps 11 bits, the
rounding of a vector of half-precision numbers, and sums of centroids stay below dim * max|c|.
Inline assembly, as Triton adds fp16 numbers one by one; so Gluon layouts only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl

from quantforge.ops.kernels.layouts import every_second
from quantforge.ops.kernels.rotation import count_factors, count_rows, row_of


@triton.jit
def add(a, b):
    """Return a + b."""
    return tl.inline_asm_elementwise(
        "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def subtract(a, b):
    """Return a - b."""
    return tl.inline_asm_elementwise(
        "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def pairs(x, ROWS: tl.constexpr, N: tl.constexpr, LAYOUT: tl.constexpr):
    """Return the even and the odd columns of x (ROWS, N) in a layout (ROWS, N / 2)."""
    even, odd = tl.split(tl.reshape(x, (ROWS, N // 2, 2)))
    HALF: tl.constexpr = every_second(LAYOUT)
    return gl.convert_layout(even, HALF), gl.convert_layout(odd, HALF)


@triton.jit
def rounded(low, high):
    """Return fp16 words of two float32 tensors."""
    return tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def rounded_runs(parts, ROWS: tl.constexpr, G: tl.constexpr, LAYOUT: tl.constexpr):
    """Return fp16 words (ROWS, G / 2) of float32 tensors (ROWS, G)."""
    words = ()
    for j in tl.static_range(len(parts)):
        low, high = pairs(parts[j], ROWS, G, LAYOUT)
        words = words + (rounded(low, high),)
    return words


@triton.jit
def rounded_to(low, high, BFLOAT16: tl.constexpr):
    """Return words of two float32 tensors: bfloat16 or fp16."""
    if BFLOAT16:
        words = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        words = rounded(low, high)
    return words


@triton.jit
def widened(words):
    """Return the low and the high halves as float32."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        mov.b32 {low, high}, $2;
        cvt.f32.f16 $0, low;
        cvt.f32.f16 $1, high;
        }""",
        "=&f,=f,r", [words], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _within(words):
    """Return (low + high, low - high)."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        .reg .b32 swapped, signs;
        mov.b32 {low, high}, $1;
        mov.b32 swapped, {high, low};
        mov.b32 signs, 0xBC003C00;
        fma.rn.f16x2 $0, $1, signs, swapped;
        }""",
        "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _stage(words, ROWS: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr):
    split = tl.reshape(words, (ROWS, N // (2 * STRIDE), 2, STRIDE))
    a, b = tl.split(tl.permute(split, (0, 1, 3, 2)))
    joined = tl.permute(tl.join(add(a, b), subtract(a, b)), (0, 1, 3, 2))
    return tl.reshape(joined, (ROWS, N))


@triton.jit
def _lane_stage(words, LANE: tl.constexpr):
    """Return the stage of lanes LANE apart: other + this, or in the upper lane other - this."""
    TEXT: tl.constexpr = f"""{{
        .reg .b32 other, lane, signs;
        .reg .pred upper;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, {LANE};
        setp.ne.u32 upper, lane, 0;
        selp.b32 signs, 0xBC00BC00, 0x3C003C00, upper;
        shfl.sync.bfly.b32 other, $1, {LANE}, 0x1f, 0xffffffff;
        fma.rn.f16x2 $0, $1, signs, other;
        }}"""
    return tl.inline_asm_elementwise(TEXT, "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def butterfly(
    words, ROWS: tl.constexpr, N: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr,
):  # fmt: skip
    """Return the Hadamard transform of rows of N numbers, words (ROWS, N / 2).

    Bits are those of a channel; bit 0 is within a word. Instructions per number: 1 for bit 0, 0.5
    for another bit in registers, 1 for one in lanes.
    """
    words = _within(words)
    for bit in tl.static_range(1, 20):
        if (1 << bit) < N:
            if bit >= FIRST_LANE_BIT and bit < FIRST_LANE_BIT + LANE_BITS:
                words = _lane_stage(words, 1 << (bit - FIRST_LANE_BIT))
            else:
                words = _stage(words, ROWS, N // 2, 1 << (bit - 1))
    return words


@triton.jit
def _sum_of_terms(parts, COLUMNS: tl.constexpr, COEFFICIENTS: tl.constexpr):
    total = parts[COLUMNS[0]]
    if COEFFICIENTS[0] == -1:
        total = total ^ -2147450880  # 0x80008000
    if COEFFICIENTS[0] == 2:
        total = add(total, total)
    for term in tl.static_range(1, len(COLUMNS)):
        x = parts[COLUMNS[term]]
        if COEFFICIENTS[term] == -1:
            total = subtract(total, x)
        elif COEFFICIENTS[term] == 1:
            total = add(total, x)
        else:
            total = tl.inline_asm_elementwise(
                "{.reg .b32 two; mov.b32 two, 0x40004000; fma.rn.f16x2 $0, $1, two, $2;}",
                "=r,r,r", [x, total], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
    return total


@triton.jit
def transform(
    parts, ROWS: tl.constexpr, G: tl.constexpr, DENSE: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr,
):  # fmt: skip
    """Return the transform of vectors in runs of G numbers, words (ROWS, G / 2) each."""
    for factor in tl.static_range(count_factors(DENSE)):
        sums = ()
        for i in tl.static_range(count_rows(DENSE, factor)):
            total = _sum_of_terms(parts, row_of(DENSE, factor, i, 0), row_of(DENSE, factor, i, 1))
            sums = sums + (total,)
        parts = sums
    turned = ()
    for j in tl.static_range(len(parts)):
        turned = turned + (butterfly(parts[j], ROWS, G, FIRST_LANE_BIT, LANE_BITS),)
    return turned
