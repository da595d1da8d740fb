"""The Hadamard butterfly of `numerics.rotation.butterfly`, in its order of additions."""

from __future__ import annotations

import triton
import triton.language as tl


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


@triton.jit
def dense_stage(parts, SIGNS: tl.constexpr, M: tl.constexpr):
    """Return the M sums `sum_j B[i, j] parts[j]`, added from left to right.

    SIGNS holds one integer per row of B; bit j is set where B[i, j] is -1. Costs M - 1 additions
    per element.
    """
    sums = ()
    for i in tl.static_range(M):
        total = parts[0]
        if SIGNS[i] & 1:
            total = total * -1.0  # unary minus is `0 - x` to Triton: of zero, not -0
        for j in tl.static_range(1, M):
            if (SIGNS[i] >> j) & 1:
                total = total - parts[j]
            else:
                total = total + parts[j]
        sums = sums + (total,)
    return sums


@triton.jit
def four_columns(x, ROWS: tl.constexpr, G: tl.constexpr):
    """Return columns 4 g + i of x (ROWS, 4 G) as one tensor (ROWS, G) for each i."""
    even, odd = tl.split(tl.reshape(x, (ROWS, G, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def from_four(first, second, third, fourth, ROWS: tl.constexpr, G: tl.constexpr):
    """Invert `four_columns`."""
    even, odd = tl.join(first, third), tl.join(second, fourth)
    return tl.reshape(tl.join(even, odd), (ROWS, 4 * G))


@triton.jit
def interleaved(
    parts, ROWS: tl.constexpr, G: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Return (ROWS, G PADDED) whose column `g PADDED + j` is parts[j], for j < M <= PADDED."""
    full = parts
    for _ in tl.static_range(M, PADDED):
        full = full + (parts[0],)
    for level in tl.static_range(5):
        if (PADDED >> level) > 1:
            pairs = ()
            for j in tl.static_range((PADDED >> level) // 2):
                pairs = pairs + (tl.join(full[j], full[j + (PADDED >> level) // 2]),)
            full = pairs
    return tl.reshape(full[0], (ROWS, G * PADDED))
