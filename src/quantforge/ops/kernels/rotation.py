"""The Hadamard butterfly of `numerics.rotation.butterfly`, in its order of additions."""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.numerics.hadamard import dense_program


@triton.jit
def stage(x, ROWS: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr):
    """Return `(a + b, a - b)` of pairs STRIDE apart along the rows of x (ROWS, N).

    Costs one addition per element where both of a pair are in one thread, as reshaping then only
    renames registers; elsewhere the compiler moves data.
    """
    pairs = tl.reshape(x, (ROWS, N // (2 * STRIDE), 2, STRIDE))
    a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    pairs = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
    return tl.reshape(pairs, (ROWS, N))


@triton.jit
def lane_stage(x, upper, LANE: tl.constexpr):
    """Return the same for pairs in lanes LANE apart; `upper` is -1 in the upper lane, else 1.

    The product is exact, so the fused addition rounds once, as `a + b` and `a - b` do.
    """
    other = tl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {LANE}, 0x1f, 0xffffffff;",
        "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1,
    )  # fmt: skip
    return tl.fma(x, upper, other)


@triton.jit
def butterfly(
    x,
    channel,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr,
    LANE_BITS: tl.constexpr,
):
    """Return the unnormalized Hadamard transform of rows (ROWS, N), N a power of two.

    `channel` is 0 .. N - 1 as a row in the layout of x. Instructions per element: 1 for each bit
    in registers, 2 for each bit in lanes.
    """
    LAST: tl.constexpr = FIRST_LANE_BIT + LANE_BITS
    for bit in tl.static_range(20):
        if (1 << bit) < N:
            if bit >= FIRST_LANE_BIT and bit < LAST:
                upper = 1.0 - 2.0 * ((channel >> bit) & 1).to(tl.float32)
                x = lane_stage(x, upper, 1 << (bit - FIRST_LANE_BIT))
            else:
                x = stage(x, ROWS, N, 1 << bit)
    return x


def dense_text(order: int, *, transpose: bool = False) -> str:
    """Return `numerics.hadamard.dense_program` as a constant of compilation: "0:1,4:-1;...|..."."""
    return "|".join(
        ";".join(",".join(f"{j}:{c}" for j, c in terms) for terms in factor)
        for factor in dense_program(order, transpose=transpose)
    )


@triton.constexpr_function
def count_factors(text: str) -> int:
    """Return how many factors a dense stage has."""
    return len(text.split("|")) if text else 0


@triton.constexpr_function
def count_rows(text: str, factor: int) -> int:
    """Return how many rows a factor has."""
    return len(text.split("|")[factor].split(";"))


@triton.constexpr_function
def row_of(text: str, factor: int, row: int, field: int) -> tuple[int, ...]:
    """Return the columns (field 0) or the coefficients (1) of the terms of a row."""
    terms = text.split("|")[factor].split(";")[row].split(",")
    return tuple(int(term.split(":")[field]) for term in terms)


@triton.jit
def sum_of_terms(parts, COLUMNS: tl.constexpr, COEFFICIENTS: tl.constexpr):
    """Return the sum of some parts times 1, -1 or 2, from left to right."""
    total = parts[COLUMNS[0]]
    if COEFFICIENTS[0] != 1:
        total = total * (COEFFICIENTS[0] * 1.0)  # unary minus is `0 - x` to Triton: of zero, not -0
    for term in tl.static_range(1, len(COLUMNS)):
        if COEFFICIENTS[term] == 1:
            total = total + parts[COLUMNS[term]]
        elif COEFFICIENTS[term] == -1:
            total = total - parts[COLUMNS[term]]
        else:  # the product is exact, so this is rounded once
            total = tl.fma(parts[COLUMNS[term]], COEFFICIENTS[term] * 1.0, total)
    return total


@triton.jit
def dense_stage(parts, DENSE: tl.constexpr):
    """Return the parts after the factors that DENSE, a `dense_text`, lists.

    Instructions per element: 4.3 for order 12, 19 for 20, 27 for 28.
    """
    for factor in tl.static_range(count_factors(DENSE)):
        sums = ()
        for i in tl.static_range(count_rows(DENSE, factor)):
            total = sum_of_terms(parts, row_of(DENSE, factor, i, 0), row_of(DENSE, factor, i, 1))
            sums = sums + (total,)
        parts = sums
    return parts


@triton.jit
def transform(
    parts, column, ROWS: tl.constexpr, G: tl.constexpr, DENSE: tl.constexpr,
    FIRST_LANE_BIT: tl.constexpr, LANE_BITS: tl.constexpr,
):  # fmt: skip
    """Return the transform of vectors in runs (ROWS, G); `column` is 0 .. G - 1 as a row."""
    parts = dense_stage(parts, DENSE)
    turned = ()
    for j in tl.static_range(len(parts)):
        turned = turned + (butterfly(parts[j], column, ROWS, G, FIRST_LANE_BIT, LANE_BITS),)
    return turned
