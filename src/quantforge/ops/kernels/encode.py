"""A tile of vectors to codes and scales: `numerics.encode`, operation by operation.

Every operation is rounded once. Launchers switch the fusion of multiplications and additions off;
divisions and square roots are the IEEE ones; sums are halved in the order of the definition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.layouts import per_row


@triton.jit
def widened(x, flips):
    """Return bfloat16 x, in pairs of one thread, as float32 with the bits of `flips` inverted.

    `flips` holds int16, or is None. Instructions per element: 1.5, or 1 without.
    """
    if flips is None:
        v = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=&r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        v = tl.inline_asm_elementwise(
            """{
            .reg .b32 flipped;
            xor.b32 flipped, $2, $3;
            shl.b32 $0, flipped, 16;
            and.b32 $1, flipped, 0xffff0000;
            }""",
            "=&r,=r,r,r", [x, flips], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return v


@triton.jit
def tree_sum(x, live, ROWS: tl.constexpr, N: tl.constexpr, LAYOUT: tl.constexpr):
    """Sum rows (ROWS, N) by halving; returns a column (ROWS, 1). `live` masks columns, or is None.

    The definition adds nothing for columns that are not there, and a sum of products may be -0.
    Here -0 is added in their place, which changes no number (and which the compiler leaves out).
    Each step adds exactly two numbers, so it has no order of its own. Costs about 1 instruction
    per element where the upper bits of a channel number registers.
    """
    if live is not None:  # a literal -0.0 would become 0.0
        x = tl.where(live, x, tl.cast(-(2**31), tl.int32).to(tl.float32, bitcast=True))
    for level in tl.static_range(20):
        if (N >> level) > 1:
            x = tl.sum(tl.reshape(x, (ROWS, 2, (N >> level) // 2)), axis=1)
    return per_row(tl.reshape(x, (ROWS,)), LAYOUT)


@triton.jit
def reciprocal(x):
    """Return 1 / x, and 0 where x is 0."""
    is_zero = x == 0.0
    return tl.where(is_zero, 0.0, tl.div_rn(1.0, tl.where(is_zero, 1.0, x)))


@triton.jit
def power_from_peak(peak):
    """Return `p = 2^floor(log2 peak)`, at least 2^-126, and 1 / p.

    The exponent of 1 / p is 254 less that of p, but 2^-127 is not a normal number.
    """
    bits = tl.maximum(peak.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000)
    inverse = tl.where(bits == 0x7F000000, 0x00400000, 0x7F000000 - bits)
    return bits.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(v, LAYOUT: tl.constexpr):
    """Return `power_from_peak` of max|v| per row, each (ROWS, 1)."""
    return power_from_peak(per_row(tl.max(tl.abs(v), axis=1), LAYOUT))


@triton.jit
def scale_factor(
    u, c, live, RULE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return the factor of the scale rule per row: (ROWS, 1). `live` is as in `tree_sum`."""
    if RULE != "norm":
        products = tree_sum(u * c, live, ROWS, N, LAYOUT)
    if RULE != "unbiased":
        squares = tree_sum(c * c, live, ROWS, N, LAYOUT)
    if RULE == "unbiased":
        factor = reciprocal(products) * (DIM * 1.0)
    elif RULE == "norm":
        factor = tl.sqrt_rn(reciprocal(squares) * (DIM * 1.0))
    else:
        factor = products * reciprocal(squares)
    return factor
