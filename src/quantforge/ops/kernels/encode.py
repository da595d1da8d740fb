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
def tree_sum(x, ROWS: tl.constexpr, N: tl.constexpr, LAYOUT: tl.constexpr):
    """Sum rows (ROWS, N), N a power of two, by halving; returns a column (ROWS, 1).

    Each step adds exactly two numbers, so it has no order of its own. Costs about 1 instruction
    per element where the upper bits of a channel number registers.
    """
    for level in tl.static_range(20):
        if (N >> level) > 1:
            x = tl.sum(tl.reshape(x, (ROWS, 2, (N >> level) // 2)), axis=1)
    return per_row(tl.reshape(x, (ROWS,)), LAYOUT)


@triton.jit
def sum_of_runs(parts, ROWS: tl.constexpr, G: tl.constexpr, LAYOUT: tl.constexpr):
    """Sum vectors given as runs (ROWS, G) in the same order; nothing is added for absent runs."""
    for level in tl.static_range(5):
        if len(parts) > 16 >> level:
            sums = ()
            for j in tl.static_range(16 >> level):
                if j + (16 >> level) < len(parts):
                    sums = sums + (parts[j] + parts[j + (16 >> level)],)
                else:
                    sums = sums + (parts[j],)
            parts = sums
    return tree_sum(parts[0], ROWS, G, LAYOUT)


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
def scaling(peak):
    """Return p of the definition for vectors of a greatest magnitude (ROWS, 1), and 1 / p."""
    power, inverse_power = power_from_peak(peak)
    is_ordinary = (peak >= 2.0**-32) & (peak < 2.0**32)
    return tl.where(is_ordinary, 1.0, power), tl.where(is_ordinary, 1.0, inverse_power)


@triton.jit
def power_of_two(v, LAYOUT: tl.constexpr):
    """Return `scaling` of vectors v (ROWS, N), each (ROWS, 1)."""
    return scaling(per_row(tl.max(tl.abs(v), axis=1), LAYOUT))


@triton.jit
def some_are_extreme(squares, LAYOUT: tl.constexpr):
    """Return whether not all sums of squares (ROWS, 1) prove that their vectors have p = 1.

    max^2 <= sum <= 2^13 max^2, with room for rounding; a NaN proves nothing. A vote says to the
    assembler what Triton knows: all lanes of a warp agree.
    """
    is_ordinary = (squares >= 2.0**-50) & (squares <= 2.0**63)
    extreme = tl.max(tl.max(tl.where(is_ordinary, 0, 1), axis=1), axis=0)
    if LAYOUT is not None:
        extreme = tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.s32 p, $1, 0;
            vote.sync.any.pred p, p, 0xffffffff;
            selp.s32 $0, 1, 0, p;
            }""",
            "=r,r", [extreme], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return extreme != 0


@triton.jit
def factor_of(products, squares, RULE: tl.constexpr, DIM: tl.constexpr):
    """Return the factor of the scale rule from <u, c> and <c, c>, (ROWS, 1) where needed."""
    if RULE == "unbiased":
        factor = reciprocal(products) * (DIM * 1.0)
    elif RULE == "norm":
        factor = tl.sqrt_rn(reciprocal(squares) * (DIM * 1.0))
    else:
        factor = products * reciprocal(squares)
    return factor


@triton.jit
def scale_factor(
    u, c, RULE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """Return the factor of the scale rule per row: (ROWS, 1)."""
    products, squares = None, None
    if RULE != "norm":
        products = tree_sum(u * c, ROWS, DIM, LAYOUT)
    if RULE != "unbiased":
        squares = tree_sum(c * c, ROWS, DIM, LAYOUT)
    return factor_of(products, squares, RULE, DIM)


@triton.jit
def product_of_runs(x, y, ROWS: tl.constexpr, G: tl.constexpr, LAYOUT: tl.constexpr):
    """Return the inner products of vectors in runs, (ROWS, 1)."""
    products = ()
    for j in tl.static_range(len(x)):
        products = products + (x[j] * y[j],)
    return sum_of_runs(products, ROWS, G, LAYOUT)


@triton.jit
def scale_factor_of_runs(
    u, c, RULE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return the same of vectors in runs (ROWS, G)."""
    products, squares = None, None
    if RULE != "norm":
        products = product_of_runs(u, c, ROWS, G, LAYOUT)
    if RULE != "unbiased":
        squares = product_of_runs(c, c, ROWS, G, LAYOUT)
    return factor_of(products, squares, RULE, DIM)
