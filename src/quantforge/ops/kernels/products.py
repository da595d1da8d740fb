"""Products of prepared queries with packed rows: scores, or the best of every group of rows.

Two kernels. Both decode a tile of rows once for all queries of a program, and walk a row in tiles
of bytes; `decode` says how codes become operands. Neither writes a decoded value to memory.

`integer_products`, up to 8 queries: one warp, int8 `mma` with rows on M and queries on N, sums
exact in int32. A query is a few columns of N, one per digit. A lane loads 16 bytes of a row, and
the operand wants 4 bytes of it from 16 k apart; since the order of channels is free, the bytes
are *declared* to be where they are wanted, no data moves (`_spread`):

    lane t of 4   bytes 16 t .. 16 t + 15        of 64 bytes of a row
    mma           k = 4 t + j, 16 + 4 t + j      j = 0..3, 16 steps of k apart

`matrix_products`, any number: fp16 or fp32 `dot`, rows on M, queries on N.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.launch import INTERPRET as _INTERPRET

INTERPRET = tl.constexpr(_INTERPRET)


@triton.jit
def _spread(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return x (ROWS, COLUMNS) with its columns renamed so that a lane holds what it loaded."""
    x = tl.reshape(x, (ROWS, 4, COLUMNS // 16, 4))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), (ROWS, COLUMNS))


@triton.jit
def _load_table(table, COUNT: tl.constexpr):
    """Load the registers of a lookup.

    Literals would end in uniform registers, which `prmt` cannot read: a copy per lookup.
    """
    values = (tl.load(table),)
    for i in tl.static_range(1, COUNT):
        values = values + (tl.load(table + i),)
    return values


@triton.jit
def _halves(low, high, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the operands of a nibble word, given its low and high nibbles byte by byte."""
    x = tl.reshape(tl.join(low, high), (ROWS, COLUMNS // 4, 2, 4))
    first, second = tl.split(tl.permute(x, (0, 1, 3, 2)))
    return tl.reshape(first, (ROWS, COLUMNS)), tl.reshape(second, (ROWS, COLUMNS))


@triton.jit
def _nibbles(inputs, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return all operands as nibbles, int32: what the inline program does, for the interpreter."""
    x = inputs[0].to(tl.int32)
    result = ()
    WORDS: tl.constexpr = (4, 2, 4, 1)[BITS - 1]
    for i in tl.static_range(WORDS):
        if BITS == 4:
            low, high = x & 15, x >> 4
        elif BITS == 3:
            source = inputs[1 + i // 2].to(tl.int32) >> (2 * (i % 2))
            bit = x >> (2 * (i % 2) + i // 2)
            low = (source & 3) | ((bit & 1) << 2)
            high = ((source >> 4) & 3) | (((bit >> 4) & 1) << 2)
        else:
            MASK: tl.constexpr = 3 if BITS == 2 else 1
            low, high = (x >> (BITS * i)) & MASK, (x >> (BITS * i + 4)) & MASK
        result = result + _halves(low, high, ROWS, COLUMNS)
    return result


@triton.jit
def _load_bytes(row, live, start, columns, BITS: tl.constexpr, STRIDE: tl.constexpr,
                OFFSET: tl.constexpr):  # fmt: skip
    """Load the inputs of a lookup by permutes: a tile of bytes from each plane involved."""
    mask = live & (columns < STRIDE - start)
    x = tl.load(row + start + OFFSET, mask=mask, other=0)  # (ROWS, TILE)
    if BITS == 3:
        a = tl.load(row + start, mask=mask, other=0)
        b = tl.load(row + start + STRIDE, mask=mask, other=0)
        inputs = (x, a, b)
    else:
        inputs = (x,)
    return inputs


@triton.jit
def allowed_rows(bitmap, rows, n, BITMAP: tl.constexpr):
    """Return which rows exist and are let through by the filter."""
    live = rows < n
    if BITMAP:
        byte = tl.load(bitmap + (rows >> 3), mask=live, other=0).to(tl.int32)
        live = live & (((byte >> (rows & 7).to(tl.int32)) & 1) != 0)
    return live


@triton.jit
def integer_products(
    packed, scales, table, digits, weights, offsets, bitmap, out,
    n, q, heads, tiles,
    stride_p0, stride_p1, stride_p, stride_s0, stride_s1, stride_s,
    BITS: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr, PADDED: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, ALIGNMENT: tl.constexpr,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, REGISTERS: tl.constexpr,
    DIGITS: tl.constexpr, SETS: tl.constexpr, BASE: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, QUERY_DIGITS: tl.constexpr,
    SPLITS: tl.constexpr, SCAN: tl.constexpr, OFFSETS: tl.constexpr, BITMAP: tl.constexpr,
    STAGES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Score QUERIES queries against `tiles` tiles of ROWS rows.

    Writes (splits, heads, q, n), partial sums of a share of the bytes each; with SCAN the best
    score of all its rows to (heads, q, groups).
    """
    COLUMNS: tl.constexpr = QUERIES * QUERY_DIGITS
    OUTPUTS: tl.constexpr = DIGITS * SETS * PARTS
    group = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    head = tl.program_id(2).to(tl.int64)
    packed += ((head // heads) * stride_p0 + (head % heads) * stride_p1) * ALIGNMENT
    packed = tl.multiple_of(packed, ALIGNMENT)
    scales += (head // heads) * stride_s0 + (head % heads) * stride_s1
    query_tile = head * tl.num_programs(1) + tl.program_id(1)
    columns = tl.arange(0, TILE)[None, :]
    column = tl.arange(0, COLUMNS)
    digit = digits + (query_tile * COLUMNS + column[:, None]) * (PARTS * PADDED) + columns
    weight = tl.load(weights + query_tile * COLUMNS + column)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    registers = _load_table(table, REGISTERS)
    SHARE: tl.constexpr = (PADDED // TILE + SPLITS - 1) // SPLITS * TILE
    first = split * SHARE
    last = tl.minimum(first + SHARE, PADDED)
    best = tl.full((QUERIES,), float("-inf"), tl.float32)
    for tile in tl.range(0, tiles, num_stages=1):
        rows = (group * tiles + tile) * ROWS + tl.arange(0, ROWS)
        live = (rows < n)[:, None]
        row = packed + rows[:, None] * stride_p * ALIGNMENT + columns
        sums = (tl.zeros((ROWS, COLUMNS), tl.int32),) * (DIGITS * SETS)
        for start in tl.range(first, last, TILE, num_stages=STAGES, loop_unroll_factor=UNROLL):
            inputs = _load_bytes(row, live, start, columns, BITS, STRIDE, OFFSET)
            if INTERPRET:
                nibbles = _nibbles(inputs, BITS, ROWS, TILE)
            else:
                values = tl.inline_asm_elementwise(
                    ASM, CONSTRAINTS, inputs + registers, (tl.int8,) * OUTPUTS, True, 4
                )
            for part in tl.static_range(PARTS):
                operand = tl.load(digit + start + part * PADDED)
                operand = tl.trans(_spread(operand, COLUMNS, TILE))  # (TILE, COLUMNS)
                new = ()
                for i in tl.static_range(DIGITS * SETS):
                    if INTERPRET:
                        value = tl.load(table + 16 * i + nibbles[part]).to(tl.int8)
                    else:
                        value = values[i * PARTS + part]
                    value = _spread(value, ROWS, TILE)
                    new = new + (tl.dot(value, operand, sums[i], out_dtype=tl.int32),)
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
            line = (split * tl.num_programs(2) + head) * q + query
            mask = (rows < n)[:, None] & (query < q)[None, :]
            target = out + line[None, :] * n + rows[:, None]
            tl.store(target, total.to(out.dtype.element_ty), mask=mask)
    if SCAN:
        groups = tl.num_programs(0)
        tl.store(out + (head * q + query) * groups + group, best, mask=query < q)


@triton.jit(do_not_specialize=["n"])
def add_splits(
    parts, offsets, out, n, size,
    SPLITS: tl.constexpr, OFFSETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up parts (SPLITS, size), and an offset for every n numbers."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * size + i, mask=inside, other=0.0)
    if OFFSETS:
        total += tl.load(offsets + i // n, mask=inside, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _physical(m, WARPS: tl.constexpr):
    """Return the row of a tile that stands at place m of an operand (see `_spread_half`)."""
    warp, half = (m >> 4) % WARPS, (m >> 3) & 1
    return ((m // (16 * WARPS) * 2 + half) * WARPS + warp) * 8 + (m & 7)


@triton.jit
def _spread_half(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Return x (ROWS, COLUMNS) renamed so that a lane of WARPS warps holds what it loaded."""
    x = tl.reshape(x, (ROWS // (16 * WARPS), 2, WARPS, 8, 4, COLUMNS // 16, 2, 2))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3, 5, 6, 4, 7)), (ROWS, COLUMNS))


@triton.jit
def _in_order(x, WARPS: tl.constexpr):
    """Return x (ROWS, columns) with the rows of its places (`_physical`) in order."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    x = tl.reshape(x, (ROWS // (16 * WARPS), WARPS, 2, 8, COLUMNS))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3, 4)), (ROWS, COLUMNS))


@triton.jit
def gather(row, base, live, channel, table, part: tl.constexpr, PLANES: tl.constexpr,
            WIDTH: tl.constexpr):  # fmt: skip
    """Return the centroids of one code per byte of the base plane."""
    code = (base >> (WIDTH * part)) & ((1 << WIDTH) - 1)
    for i in tl.static_range(1, len(PLANES)):  # width, shift, offset, stride
        byte = tl.load(row + PLANES[i][2] + channel % PLANES[i][3], mask=live, other=0)
        field = byte.to(tl.int32) >> (channel // PLANES[i][3] * PLANES[i][0])
        code |= (field & ((1 << PLANES[i][0]) - 1)) << PLANES[i][1]
    return tl.load(table + code)


@triton.jit
def _best_of_classes(scores, PERMUTE: tl.constexpr, WARPS: tl.constexpr):
    """Return the maximum of the rows of each run, NaN left out: (8 * WARPS, QUERIES)."""
    ROWS: tl.constexpr = scores.shape[0]
    QUERIES: tl.constexpr = scores.shape[1]
    if INTERPRET:  # numpy's maximum keeps NaN, that of the hardware does not
        scores = tl.where(scores == scores, scores, float("-inf"))
    if PERMUTE:  # places are (r, warp, half, 8)
        scores = tl.reshape(scores, (ROWS // (16 * WARPS), WARPS, 2, 8, QUERIES))
        best = tl.max(tl.max(scores, 2), 0)
    else:
        best = tl.max(tl.reshape(scores, (ROWS // (8 * WARPS), WARPS, 8, QUERIES)), 0)
    return tl.reshape(best, (8 * WARPS, QUERIES))


@triton.jit
def _product(
    packed, stride_p, loaded, n, columns, table, registers, ask, asked,
    BITS: tl.constexpr, DIM: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    PADDED: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, ALIGNMENT: tl.constexpr,
    PERMUTE: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, PLANES: tl.constexpr,
    PRECISION: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return sums of products of rows with queries, (ROWS, QUERIES), in places of `_physical`."""
    ROWS: tl.constexpr = loaded.shape[0]
    live = (loaded < n)[:, None]
    row = packed + loaded[:, None] * stride_p * ALIGNMENT
    total = tl.zeros((ROWS, asked.shape[1]), tl.float32)
    for start in tl.range(0, PADDED, TILE, num_stages=STAGES):
        if PERMUTE:
            inputs = _load_bytes(row + columns, live, start, columns, BITS, STRIDE, OFFSET)
            values = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS, inputs + registers, (tl.float16,) * PARTS, True, 4
            )
        else:
            inside = live & (start + columns < STRIDE)
            base = tl.load(row + start + columns, mask=inside, other=0).to(tl.int32)
        for part in tl.static_range(PARTS):
            operand = tl.load(ask + start + part * PADDED, mask=asked, other=0.0)
            if PERMUTE:
                value = _spread_half(values[part], ROWS, TILE, WARPS)
            else:
                channel = start + columns + part * STRIDE
                value = gather(
                    row, base, inside & (channel < DIM), channel, table, part, PLANES,
                    PLANES[0][0],
                )  # fmt: skip
                value = value.to(operand.dtype)
            total = tl.dot(value, operand, total, input_precision=PRECISION)
    return total


@triton.jit
def matrix_products(
    packed, scales, table, queries, weights, offsets, bitmap, out,
    n, q, heads, tiles,
    stride_p0, stride_p1, stride_p, stride_s0, stride_s1, stride_s,
    BITS: tl.constexpr, DIM: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    PADDED: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, ALIGNMENT: tl.constexpr,
    PERMUTE: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, PLANES: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, WARPS: tl.constexpr,
    SCAN: tl.constexpr, OFFSETS: tl.constexpr, BITMAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Score QUERIES queries against `tiles` tiles of ROWS rows.

    Writes as `integer_products`, but with SCAN one score per class: the rows of a program are
    `8 * WARPS` runs, and a tile takes the next few rows of every run, such that those of one run
    fall to the same lanes. A lane finds their maximum among its own accumulators; that of a tile of
    neighbouring rows would take 200 shuffles per tile and thread, a quarter of the time.
    """
    query_tiles = tl.cdiv(q, QUERIES)
    group = (tl.program_id(0) // query_tiles).to(tl.int64)
    query = tl.program_id(0) % query_tiles * QUERIES + tl.arange(0, QUERIES)
    head = tl.program_id(1).to(tl.int64)
    packed += ((head // heads) * stride_p0 + (head % heads) * stride_p1) * ALIGNMENT
    packed = tl.multiple_of(packed, ALIGNMENT)
    scales += (head // heads) * stride_s0 + (head % heads) * stride_s1
    columns = tl.arange(0, TILE)[None, :]
    line = head * q + query
    ask = queries + line[None, :] * (PARTS * PADDED) + tl.arange(0, TILE)[:, None]
    asked = (query < q)[None, :]
    weight = tl.load(weights + line, mask=query < q, other=1.0)
    CLASSES: tl.constexpr = 8 * WARPS
    PER_CLASS: tl.constexpr = ROWS // CLASSES
    loaded = tl.arange(0, ROWS)
    place = loaded
    registers = ()
    if PERMUTE:
        place = _physical(place, WARPS)
        registers = _load_table(table, 4)
    size = PER_CLASS * tiles
    start_row = group * CLASSES * size
    if SCAN:
        loaded = start_row + loaded % CLASSES * size + loaded // CLASSES
        place = start_row + place % CLASSES * size + place // CLASSES
        best = tl.full((CLASSES, QUERIES), float("-inf"), tl.float32)
        for tile in tl.range(0, tiles, num_stages=1):
            total = _product(
                packed, stride_p, loaded + tile * PER_CLASS, n, columns, table, registers, ask,
                asked, BITS, DIM, STRIDE, OFFSET, PADDED, PARTS, TILE, ALIGNMENT, PERMUTE, ASM,
                CONSTRAINTS, PLANES, PRECISION, WARPS, STAGES,
            )  # fmt: skip
            rows = place + tile * PER_CLASS
            scale = tl.load(scales + rows * stride_s, mask=rows < n, other=0.0).to(tl.float32)
            scale = tl.where(allowed_rows(bitmap, rows, n, BITMAP), scale, float("nan"))
            best = tl.maximum(best, _best_of_classes(total * scale[:, None], PERMUTE, WARPS))
        groups = tl.num_programs(0) // query_tiles * CLASSES
        best = best * weight[None, :]  # weights are >= 0, or NaN for a query that has no scores
        best = tl.where(best == best, best, float("-inf"))
        target = out + line[None, :] * groups + group * CLASSES + tl.arange(0, CLASSES)[:, None]
        tl.store(target, best, mask=asked)
    else:
        rows, place = start_row + loaded, start_row + place
        total = _product(
            packed, stride_p, rows, n, columns, table, registers, ask, asked,
            BITS, DIM, STRIDE, OFFSET, PADDED, PARTS, TILE, ALIGNMENT, PERMUTE, ASM, CONSTRAINTS,
            PLANES, PRECISION, WARPS, STAGES,
        )  # fmt: skip
        scale = tl.load(scales + place * stride_s, mask=place < n, other=0.0).to(tl.float32)
        total = total * scale[:, None] * weight[None, :]
        if OFFSETS:
            total += tl.load(offsets + line, mask=query < q, other=0.0)[None, :]
        total = total.to(out.dtype.element_ty)
        if PERMUTE:  # neighbouring rows are stored at once
            total = _in_order(total, WARPS)
        target = out + line[None, :] * n + rows[:, None]
        tl.store(target, total, mask=(rows < n)[:, None] & asked)
