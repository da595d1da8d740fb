"""Pages of the history for a dense attention kernel: decode some, and what stands around it.

    decode_pages      pages -> keys and values (B Hkv, tokens, dim), `scale * centroid`, rotated
    rotate_queries    queries -> the same basis: R (equalizer q); and `scale q . shift`
    merge_extended    outputs -> channels: equalizer R^T x + shift, and the dense tokens' part

A page holds keys token by token and values channel by channel (`numerics.pages`); a tile of bytes
becomes 2 or 4 tiles of centroids (`parts`) whose columns are neighbours, whatever the bits:

    keys     byte (t, c)  ->  part p: token t, channel p C + c     C = D / parts    stored so
    values   byte (d, c)  ->  part p: channel d, token p C + c     C = T / parts    turned first

Instructions per number at 4 bits: 1.5 look up, 2.5 scale and round, 0.2 load and store; values 0.4
more for the turn. An H200 at its read ceiling has 13 for the 2 bytes that it writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.launch import INTERPRET as _INTERPRET

INTERPRET = tl.constexpr(_INTERPRET)


@triton.jit
def _scale_place(token, TOKENS: tl.constexpr):
    """Return where a page stores the scale of a token (`numerics.pages.scale_order`)."""
    row = token // 32 * 32 + token % 2 + token // 4 % 8 * 2 + token // 2 % 2 * 16
    return row % 8 * (TOKENS // 8) + row // 8


@triton.jit
def _entries(row, columns, table, BITS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
             high_row):  # fmt: skip
    """Look a part up without `prmt`: (row bytes at `row`, plane 1 at `high_row`) to float32."""
    word, i = columns // 4 * 4, columns % 4
    if BITS == 4:
        byte = tl.load(row + word + 2 * PART + i // 2).to(tl.int32)
        sign = tl.load(row + columns).to(tl.int32) >> (7 - 4 * PART)
        value = tl.load(table + ((byte >> (i % 2 * 4)) & 7))
        return tl.where((sign & 1) != 0, -value, value)
    place = 2 * (PART % 2) + i // 2
    shift = i % 2 * 4 + 2 * (PART // 2)
    code = (tl.load(row + word + place).to(tl.int32) >> shift) & 3
    if BITS == 3:
        HALF: tl.constexpr = COLUMNS // 2
        byte = tl.load(high_row + word % HALF + place).to(tl.int32)
        code |= ((byte >> (shift + word // HALF)) & 1) << 2
    return tl.load(table + code)


@triton.jit
def _decoded(page, rows, columns, table, LENGTH: tl.constexpr, ROWS: tl.constexpr,
             BITS: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr,
             OPERANDS: tl.constexpr):  # fmt: skip
    """Return the parts of all rows of a page, LENGTH codes each: tiles (ROWS, LENGTH / PARTS)."""
    COLUMNS: tl.constexpr = LENGTH // PARTS
    row = page + rows * COLUMNS
    high_row = page + ROWS * COLUMNS + rows * (COLUMNS // 2)
    if INTERPRET:
        values = ()
        for part in tl.static_range(PARTS):
            values = values + (_entries(row, columns, table, BITS, COLUMNS, part, high_row),)
    else:
        inputs = (tl.load(row + columns),)
        if BITS == 3:
            HALF: tl.constexpr = COLUMNS // 2
            high = tl.load(high_row + columns % HALF)
            inputs = (inputs[0], (high >> (columns // HALF).to(tl.uint8)).to(tl.uint8))
        registers = (
            tl.load(table), tl.load(table + 32), tl.load(table + 64), tl.load(table + 96),
        )  # fmt: skip
        values = tl.inline_asm_elementwise(
            PTX, OPERANDS, inputs + registers, (tl.float16,) * PARTS, True, 4
        )
    return values


@triton.jit
def _decode_keys(
    pages, table, out, page, at,
    D: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr,
    OPERANDS: tl.constexpr,
):  # fmt: skip
    """Write the keys of a page to the rows of `out` from `at` on."""
    BYTES: tl.constexpr = T * (D * BITS // 8)
    PARTS: tl.constexpr = 2 if BITS == 4 else 4
    COLUMNS: tl.constexpr = D // PARTS
    start = pages + page * (BYTES + 2 * T)
    token = tl.arange(0, T)
    column = tl.arange(0, COLUMNS)[None, :]
    scales = (start + BYTES).to(tl.pointer_type(tl.float16))
    scale = tl.load(scales + _scale_place(token, T)).to(tl.float32)
    tiles = _decoded(start, token[:, None], column, table, D, T, BITS, PARTS, PTX, OPERANDS)
    for part in tl.static_range(PARTS):
        x = tiles[part].to(tl.float32) * scale[:, None]
        target = out + (at + token)[:, None] * D + (part * COLUMNS + column)
        tl.store(target, x.to(out.dtype.element_ty))


@triton.jit
def _decode_values(
    pages, table, out, page, at,
    D: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr,
    OPERANDS: tl.constexpr,
):  # fmt: skip
    """Write the values of a page to the rows of `out` from `at` on."""
    BYTES: tl.constexpr = D * (T * BITS // 8)
    PARTS: tl.constexpr = 2 if BITS == 4 else 4
    COLUMNS: tl.constexpr = T // PARTS
    start = pages + page * (BYTES + 2 * T)
    channel = tl.arange(0, D)
    column = tl.arange(0, COLUMNS)
    scales = (start + BYTES).to(tl.pointer_type(tl.float16))
    tiles = _decoded(
        start, channel[:, None], column[None, :], table, T, D, BITS, PARTS, PTX, OPERANDS
    )
    for part in tl.static_range(PARTS):
        token = part * COLUMNS + column
        scale = tl.load(scales + _scale_place(token, T)).to(tl.float32)
        x = (tiles[part].to(tl.float32) * scale[None, :]).to(out.dtype.element_ty)
        target = out + (at + token)[:, None] * D + channel[None, :]
        tl.store(target, tl.trans(x))


@triton.jit(do_not_specialize=["first", "capacity"])
def decode_pages(
    k_pages, v_pages, k_table, v_table, page_table, keys, values, first, pages_per_row, capacity,
    HKV: tl.constexpr, D: tl.constexpr, T: tl.constexpr, K_BITS: tl.constexpr,
    V_BITS: tl.constexpr, K_PTX: tl.constexpr, K_OPERANDS: tl.constexpr, V_PTX: tl.constexpr,
    V_OPERANDS: tl.constexpr,
):  # fmt: skip
    """Decode pages `first` + program id of all heads. Grid: (pages, B * Hkv, 2); keys, values."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // HKV, head % HKV
    index = first + tl.program_id(0)
    if page_table is None:
        page = b * pages_per_row + index
    else:
        page = tl.load(page_table + b * pages_per_row + index).to(tl.int64)
    at = head * capacity + tl.program_id(0) * T  # a token
    if tl.program_id(2) == 0:
        _decode_keys(k_pages, k_table, keys, page * HKV + h, at, D, T, K_BITS, K_PTX, K_OPERANDS)
    else:
        _decode_values(
            v_pages, v_table, values, page * HKV + h, at, D, T, V_BITS, V_PTX, V_OPERANDS
        )


@triton.jit
def _rotated(x, matrix, at, TERMS: tl.constexpr, SIZE: tl.constexpr):
    """Return x @ matrix[at] for float32 x, in bfloat16 terms of both: no number can overflow.

    TERMS 1: the matrix is +-1 and has no second term.
    """
    if INTERPRET:  # it gets bfloat16 wrong
        product = tl.dot(x, tl.load(matrix + at), input_precision="ieee")
    else:
        m = tl.load(matrix + at)
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(low, m, tl.dot(high, m))
        if TERMS == 2:
            product = tl.dot(high, tl.load(matrix + SIZE + at), product)
    return product


@triton.jit(do_not_specialize=["rows", "q_len", "padded"])
def rotate_queries(
    query, matrix, equalizer, shift, out, offsets, rows, q_len, padded, scale, unit,
    query_b, query_h, query_q, eq_b, eq_h, shift_b, shift_h,
    HKV: tl.constexpr, D: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write R (equalizer * q), (B * Hkv, padded, D), zeros behind the rows; `scale * q . shift`.

    Grid: (padded / ROWS, B * Hkv). R is `unit * matrix`. A row is a query of a query head that
    shares the key head.
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // HKV, head % HKV
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    inside = row < rows
    source = query + b * query_b + h * (rows // q_len) * query_h
    source += (row // q_len * query_h + row % q_len * query_q)[:, None]
    q = tl.load(source + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    if shift is not None:
        centre = tl.load(shift + b * shift_b + h * shift_h + d).to(tl.float32)
        logits = tl.sum(q * centre[None, :], 1) * tl.cast(scale, tl.float32)
        tl.store(offsets + head * rows + row, logits, mask=inside)
    if equalizer is not None:
        q = q * tl.load(equalizer + b * eq_b + h * eq_h + d).to(tl.float32)[None, :]
    for start in tl.static_range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        # of R^T: (channel, rotated channel)
        turned = _rotated(q, matrix, column[None, :] * D + d[:, None], TERMS, D * D)
        turned *= tl.cast(unit, tl.float32)
        target = out + (head * padded + row)[:, None] * D + column[None, :]
        tl.store(target, turned.to(out.dtype.element_ty), mask=(row < padded)[:, None])


@triton.jit
def _part(out, lse, b, h, row, inside, d, out_b, out_h, out_row, lse_b, lse_h, lse_row):
    """Return outputs (ROWS, D) and log-sum-exps (ROWS,) of some rows, float32."""
    at = out + b * out_b + h * out_h + (row.to(tl.int64) * out_row)[:, None] + d[None, :]
    x = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    at = lse + b * lse_b + h * lse_h + row.to(tl.int64) * lse_row
    return x, tl.load(at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows", "q_len"])
def merge_extended(
    first, first_lse, last, last_lse, dense, dense_lse, offsets, matrix, equalizer, shift,
    out, lse, rows, q_len, unit,
    first_b, first_h, first_row, first_lse_b, first_lse_h, first_lse_row,
    last_b, last_h, last_row, last_lse_b, last_lse_h, last_lse_row,
    dense_b, dense_h, dense_row, dense_lse_b, dense_lse_h, dense_lse_row,
    eq_b, eq_h, shift_b, shift_h,
    HKV: tl.constexpr, D: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge two parts of the history, and the dense tokens' part (B, Hq, q, D); None: not there.

    `out = w (equalizer R^T x + shift) + (1 - w) dense` with w the history's weight, (B, Hq, q, D);
    `offsets` are added to the log-sum-exp of the history (arXiv 2205.14135, section 3.1).
    Grid: (rows / ROWS, B * Hkv). R is `unit * matrix`.
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // HKV, head % HKV
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    d = tl.arange(0, D)
    x, total = _part(
        last, last_lse, b, h, row, inside, d, last_b, last_h, last_row,
        last_lse_b, last_lse_h, last_lse_row,
    )  # fmt: skip
    if first is not None:
        y, other = _part(
            first, first_lse, b, h, row, inside, d, first_b, first_h, first_row,
            first_lse_b, first_lse_h, first_lse_row,
        )  # fmt: skip
        peak = tl.maximum(total, other)
        x_weight, y_weight = tl.exp(total - peak), tl.exp(other - peak)
        both = x_weight + y_weight
        x = x * (x_weight / both)[:, None] + y * (y_weight / both)[:, None]
        total = peak + tl.log(both)
    if offsets is not None:
        total += tl.load(offsets + head * rows + row, mask=inside, other=0.0)
    weight = tl.full((ROWS,), 1.0, tl.float32)
    line = b * dense_b + (h * (rows // q_len) + row // q_len) * dense_h + row % q_len * dense_row
    if dense is not None:
        at = b * dense_lse_b + (h * (rows // q_len) + row // q_len) * dense_lse_h
        other = tl.load(dense_lse + at + row % q_len * dense_lse_row, mask=inside, other=0.0)
        peak = tl.maximum(total, other)
        x_weight, y_weight = tl.exp(total - peak), tl.exp(other - peak)
        both = x_weight + y_weight
        weight = x_weight / both
        total = peak + tl.log(both)
    x = x * (weight * tl.cast(unit, tl.float32))[:, None]
    for start in tl.static_range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        # (rotated channel, channel)
        y = _rotated(x, matrix, d[:, None] * D + column[None, :], TERMS, D * D)
        if equalizer is not None:
            factor = tl.load(equalizer + b * eq_b + h * eq_h + column).to(tl.float32)
            y = y * factor[None, :]
        if shift is not None:
            centre = tl.load(shift + b * shift_b + h * shift_h + column).to(tl.float32)
            y += weight[:, None] * centre[None, :]
        if dense is not None:
            tail = tl.load(dense + line[:, None] + column[None, :], mask=inside[:, None], other=0.0)
            y += (1.0 - weight)[:, None] * tail.to(tl.float32)
        target = out + (head * rows + row)[:, None] * D + column[None, :]
        tl.store(target, y.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + head * rows + row, total, mask=inside)
