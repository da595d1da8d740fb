"""Products of a few queries with short rows: the queries stay in registers, rows stream past.

As `products.integer_products` (one warp, int8 `mma`, rows on M, digits of queries on N), for rows
of so few bytes that a query's operands fit into the registers of a warp. Then a tile is 16 whole
rows, the loop over a row's bytes is unrolled, and the next tile arrives while this one is worked
on; there is no pipeline to fill for each tile of rows, and no operand is read twice.

Issued instructions (of them on the half-rate ALU) per code, SASS of sm_90, Triton 3.6, 4 bits, dim
768; an H200 at its read ceiling has 3.3 (1.65):

    1 digit, groups      1.3 (0.9)      119 registers
    2 digits, scores     2.9 (1.4)      128 registers, 1.0 of it moves to line operands up
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.products import (
    _load_table,
    _nibbles,
    _spread,
    allowed_rows,
)
from quantforge.ops.launch import INTERPRET as _INTERPRET

INTERPRET = tl.constexpr(_INTERPRET)


@triton.jit
def _times(value, operand, total):
    return tl.dot(value, operand, total, out_dtype=tl.int32)


@triton.jit
def _inputs(row, live, start: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr,
            OFFSET: tl.constexpr):  # fmt: skip
    """Load the inputs of a lookup by permutes: full tiles of bytes."""
    x = tl.load(row + start + OFFSET, mask=live, other=0)  # (ROWS, TILE)
    if BITS == 3:
        a = tl.load(row + start, mask=live, other=0)
        b = tl.load(row + start + STRIDE, mask=live, other=0)
        inputs = (x, a, b)
    else:
        inputs = (x,)
    return inputs


@triton.jit(do_not_specialize=["n", "q", "heads", "tiles"])
def whole_row_products(
    packed, scales, table, digits, weights, offsets, bitmap, out,
    n, q, heads, tiles,
    stride_p0, stride_p1, stride_p, stride_s0, stride_s1, stride_s,
    BITS: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, ALIGNMENT: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
    REGISTERS: tl.constexpr, DIGITS: tl.constexpr, SETS: tl.constexpr, BASE: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, QUERY_DIGITS: tl.constexpr, SCAN: tl.constexpr,
    OFFSETS: tl.constexpr, BITMAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Score QUERIES queries against `tiles` tiles of ROWS rows of STRIDE bytes a plane.

    Writes (heads, q, n); with SCAN the best score of all its rows to (heads, q, groups).
    """
    COLUMNS: tl.constexpr = QUERIES * QUERY_DIGITS
    OUTPUTS: tl.constexpr = DIGITS * SETS * PARTS
    STEPS: tl.constexpr = STRIDE // TILE
    group = tl.program_id(0).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    packed += ((head // heads) * stride_p0 + (head % heads) * stride_p1) * ALIGNMENT
    packed = tl.multiple_of(packed, ALIGNMENT)
    scales += (head // heads) * stride_s0 + (head % heads) * stride_s1
    query_tile = head * tl.num_programs(1) + tl.program_id(1)
    columns = tl.arange(0, TILE)[None, :]
    column = tl.arange(0, COLUMNS)
    digit = digits + (query_tile * COLUMNS + column[:, None]) * (PARTS * STRIDE) + columns
    weight = tl.load(weights + query_tile * COLUMNS + column)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    registers = _load_table(table, REGISTERS)
    operands = ()
    for step in tl.static_range(STEPS):
        for part in tl.static_range(PARTS):
            loaded = _spread(tl.load(digit + step * TILE + part * STRIDE), COLUMNS, TILE)
            operands = operands + (tl.trans(loaded),)  # (TILE, COLUMNS)
    best = tl.full((QUERIES,), float("-inf"), tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        rows = (group * tiles + tile) * ROWS + tl.arange(0, ROWS)
        live = (rows < n)[:, None]
        row = packed + rows[:, None] * stride_p * ALIGNMENT + columns
        sums = (tl.zeros((ROWS, COLUMNS), tl.int32),) * (DIGITS * SETS)
        for step in tl.static_range(STEPS):
            inputs = _inputs(row, live, step * TILE, BITS, STRIDE, OFFSET)
            if INTERPRET:
                nibbles = _nibbles(inputs, BITS, ROWS, TILE)
            else:
                values = tl.inline_asm_elementwise(
                    ASM, CONSTRAINTS, inputs + registers, (tl.int8,) * OUTPUTS, True, 4
                )
            for part in tl.static_range(PARTS):
                new = ()
                for i in tl.static_range(DIGITS * SETS):
                    if INTERPRET:
                        value = tl.load(table + 16 * i + nibbles[part]).to(tl.int8)
                    else:
                        value = values[i * PARTS + part]
                    value = _spread(value, ROWS, TILE)
                    new = new + (_times(value, operands[step * PARTS + part], sums[i]),)
                sums = new
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(DIGITS):
            digit_sum = sums[SETS * i]
            if SETS == 2:
                digit_sum -= sums[SETS * i + 1]
            total = total * BASE + digit_sum.to(tl.float32)
        total = tl.sum(tl.reshape(total * weight[None, :], (ROWS, QUERIES, QUERY_DIGITS)), 2)
        scale = tl.load(scales + rows * stride_s, mask=rows < n, other=0.0).to(tl.float32)
        total *= scale[:, None]
        if SCAN:
            allowed = allowed_rows(bitmap, rows, n, BITMAP)
            total = tl.where(allowed[:, None] & (total == total), total, float("-inf"))
            best = tl.maximum(best, tl.max(total, 0))
        else:
            if OFFSETS:
                offset = tl.load(offsets + head * q + query, mask=query < q, other=0.0)
                total += offset[None, :]
            mask = (rows < n)[:, None] & (query < q)[None, :]
            target = out + (head * q + query)[None, :] * n + rows[:, None]
            tl.store(target, total.to(out.dtype.element_ty), mask=mask)
    if SCAN:
        groups = tl.num_programs(0)
        tl.store(out + (head * q + query) * groups + group, best, mask=query < q)
