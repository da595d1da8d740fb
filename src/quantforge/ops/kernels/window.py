"""The kernel of `window_append`: one program for the keys, or the values, of one head.

    dense    [ sinks ][ page to pack ][ recent ............... ][ room ]      rows are full
             [ sinks ][ recent ............... ][ new ][ room          ]      after packing

Nearly every launch only writes q rows; every `page` tokens one packs a page and moves the window up
by a page, in steps that read their rows before they write. All programs read `counts`; the last one
to finish updates them. After a crop the last page may hold some tokens already: `kept` of them,
whose bits and scales stay, and `page - kept` rows fill it.

The codes of a page are spread over words as `numerics.pages` draws them. A code contributes bits to
a word, a word is the sum of its contributions: along the channels of a token for keys, along the
tokens of a channel for values, so a page is packed by two reductions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.codebook import nearest
from quantforge.ops.kernels.encode import reciprocal, scale_factor, scaling, tree_sum
from quantforge.ops.kernels.layouts import per_row
from quantforge.ops.kernels.packing import store_codes
from quantforge.ops.kernels.rotation import butterfly


@triton.jit
def _words(x, N: tl.constexpr, OTHER: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr):
    """Sum contributions (tokens, channels) to words of 4 neighbours in each of PARTS parts.

    N is the length of the axis that is packed: channels for keys, whose words are
    (OTHER, N / PARTS / 4), or tokens for values, (N / PARTS / 4, OTHER).
    """
    WORDS: tl.constexpr = N // PARTS // 4
    if KEYS:
        x = tl.sum(tl.reshape(x, (OTHER, PARTS, WORDS, 4)), axis=3)
        x = tl.sum(x, axis=1)
    else:
        x = tl.sum(tl.reshape(x, (PARTS, WORDS, 4, OTHER)), axis=2)
        x = tl.sum(x, axis=0)
    return x


@triton.jit
def _high_words(x, N: tl.constexpr, OTHER: tl.constexpr, KEYS: tl.constexpr):
    """Sum contributions to the words of plane 1 of 3-bit codes: one for two words of plane 0."""
    HALF: tl.constexpr = N // 32
    if KEYS:
        x = tl.sum(tl.reshape(x, (OTHER, 4, 2, HALF, 4)), axis=4)
        x = tl.sum(tl.sum(x, axis=2), axis=1)
    else:
        x = tl.sum(tl.reshape(x, (4, 2, HALF, 4, OTHER)), axis=3)
        x = tl.sum(tl.sum(x, axis=1), axis=0)
    return x


@triton.jit
def _plane(
    codes, selected, N: tl.constexpr, OTHER: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr,
    PLANE: tl.constexpr,
):  # fmt: skip
    """Return the words of a plane, with the bits of the selected tokens (T, 1) only."""
    PARTS: tl.constexpr = 2 if BITS == 4 else 4
    index = tl.arange(0, N)
    index = index[None, :] if KEYS else index[:, None]
    part = index // (N // PARTS)
    i = index % 4
    if BITS == 4:
        symbol = tl.where(codes >= 8, codes ^ 8, codes ^ 15)
        low = 16 * part + 4 * i
        sign = 8 * i + 7 - 4 * part
        x = ((symbol & 7) << low) | ((symbol >> 3) << sign)
    else:
        low = 16 * (part % 2) + 4 * i + 2 * (part // 2)
        half = (index % (N // 4)) // (N // 8)
        if PLANE == 0:
            x = (codes & 3) << low
        else:
            x = (codes >> 2) << (low + half)
    x = tl.where(selected, x, 0)
    if PLANE == 0:
        x = _words(x, N, OTHER, PARTS, KEYS)
    else:
        x = _high_words(x, N, OTHER, KEYS)
    return x


@triton.jit
def _store_plane(
    codes, token, kept, at, WORDS: tl.constexpr,
    N: tl.constexpr, OTHER: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr,
    PLANE: tl.constexpr,
):  # fmt: skip
    """Store WORDS words for each of OTHER rows; the bits of the first `kept` tokens stay."""
    words = _plane(codes, token >= kept, N, OTHER, BITS, KEYS, PLANE)
    row = tl.arange(0, OTHER)
    word = tl.arange(0, WORDS)
    if KEYS:  # `_words` has them along axis 1, else along axis 0
        at += row[:, None] * WORDS + word[None, :]
    else:
        at += row[None, :] * WORDS + word[:, None]
    if kept > 0:
        # the code whose bits are all set; two threads with one word agree, whoever reads it later
        ones = tl.zeros_like(codes) + (0 if BITS == 4 else (1 << BITS) - 1)
        words |= tl.load(at) & _plane(ones, token < kept, N, OTHER, BITS, KEYS, PLANE)
    tl.store(at, words)


@triton.jit
def _store_page(
    codes, token, kept, page_words,
    T: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Store the codes (T, D) of a page as planes of words; `page_words` points to int32."""
    N: tl.constexpr = D if KEYS else T
    OTHER: tl.constexpr = T if KEYS else D
    LOW: tl.constexpr = N // 8 if BITS == 4 else N // 16
    _store_plane(codes, token, kept, page_words, LOW, N, OTHER, BITS, KEYS, 0)
    if BITS == 3:
        at = page_words + T * D // 16
        _store_plane(codes, token, kept, at, N // 32, N, OTHER, BITS, KEYS, 1)


@triton.jit
def _measure(
    recent, count, statistics, other,
    SHIFTS: tl.constexpr, EQUALIZES: tl.constexpr, LEAST: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Measure shift and equalizer of `count` rows as `ops.measure` does, and store them.

    The third row of the statistics is the RMS of the queries' channels, zeros where none was seen.
    """
    d = tl.arange(0, D)
    r = tl.arange(0, R)
    total = tl.zeros((D,), tl.float32)
    for start in range(0, count, R):
        inside = (start + r < count)[:, None]
        at = recent + (start + r)[:, None] * D + d[None, :]
        total += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), 0)
    shift = total / count
    if SHIFTS:
        center = shift
    else:  # channels are coded about zero
        center = tl.zeros((D,), tl.float32)
    square = tl.zeros((D,), tl.float32)
    for start in range(0, count, R):
        inside = (start + r < count)[:, None]
        at = recent + (start + r)[:, None] * D + d[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32) - center[None, :]
        square += tl.sum(tl.where(inside, x * x, 0.0), 0)
    rms = tl.sqrt_rn(square / count)
    query = tl.load(statistics + 2 * other + d)
    loudest = tl.max(query, 0)
    rms = rms / tl.maximum(query, tl.where(loudest > 0, LEAST * loudest, 1.0))
    peak = tl.max(rms, 0)
    relative = tl.where(peak > 0, rms / tl.where(peak > 0, peak, 1.0), 1.0)
    if SHIFTS:
        tl.store(statistics + d, shift)
    if EQUALIZES:  # EQUALIZER_EXPONENT is one half
        tl.store(statistics + other + d, tl.maximum(tl.sqrt_rn(relative), LEAST))


@triton.jit
def _encode(
    rows, row, inside, statistics, other, signs, table,
    D: tl.constexpr, R: tl.constexpr, RULE: tl.constexpr, SLOPE: tl.constexpr, CELLS: tl.constexpr,
    INV_SQRT_DIM: tl.constexpr,
):  # fmt: skip
    """Return codes (R, D) and fp16 scales (R, 1) of rows, as `numerics.encode` defines them."""
    channel = tl.arange(0, D)[None, :]
    v = tl.load(rows + row * D + channel, mask=inside, other=0.0).to(tl.float32)
    v = v - tl.load(statistics + channel)
    factor = tl.div_rn(1.0, tl.load(statistics + other + channel))
    v = v * (factor * tl.load(signs + channel))
    power, inverse_power = scaling(per_row(tl.max(tl.abs(v), axis=1), None))
    v = v * inverse_power
    norm = tl.sqrt_rn(tree_sum(v * v, R, D, None))
    u = butterfly(v, channel, R, D, 0, 0) * reciprocal(norm)
    codes, c = nearest(u, table, SLOPE, CELLS)
    factor = scale_factor(u, c, RULE, D, R, None)
    return codes, (norm * INV_SQRT_DIM * factor * power).to(tl.float16)


@triton.jit
def _move_up(recent, count, by, D: tl.constexpr, R: tl.constexpr):
    """Move rows `by .. by + count` to the start, R at a time; those written have been read."""
    d = tl.arange(0, D)
    r = tl.arange(0, R)
    for start in range(0, count, R):
        inside = (start + r < count)[:, None]
        target = recent + (start + r)[:, None] * D + d[None, :]
        moved = tl.load(target + by * D, mask=inside)
        tl.debug_barrier()  # all have read before any writes
        tl.store(target, moved, mask=inside)
    tl.debug_barrier()


@triton.jit
def _append(
    dense, packed, words, halves, scales, statistics, other, signs, table, order, x, x_row,
    head, page_at, n_packed, n_dense, due, moved, fits, q, rows, n_sinks, page, tokens,
    SHIFTS: tl.constexpr, EQUALIZES: tl.constexpr, LEAST: tl.constexpr,
    D: tl.constexpr, BITS: tl.constexpr, RULE: tl.constexpr, SLOPE: tl.constexpr,
    CELLS: tl.constexpr, INV_SQRT_DIM: tl.constexpr, PLANES: tl.constexpr, ROW_BYTES: tl.constexpr,
    PAGED: tl.constexpr, KEYS: tl.constexpr, T: tl.constexpr, Q: tl.constexpr, MOVE: tl.constexpr,
):  # fmt: skip
    """Pack and move where due, then write the new rows where they fit."""
    dense += head.to(tl.int64) * rows * D
    statistics += head.to(tl.int64) * D
    recent = dense + n_sinks * D
    d = tl.arange(0, D)
    if due:
        if n_packed == 0:
            _measure(
                recent, n_dense - n_sinks, statistics, other, SHIFTS, EQUALIZES, LEAST, D, MOVE
            )
            tl.debug_barrier()  # other threads read what was measured
        if PAGED:
            kept = page - moved
            row = tl.arange(0, T)[:, None]
            codes, scale = _encode(
                recent, row - kept, row >= kept, statistics, other, signs, table,
                D, T, RULE, SLOPE, CELLS, INV_SQRT_DIM,
            )  # fmt: skip
            PAGE_BYTES: tl.constexpr = T * (D * BITS // 8 + 2)
            index = page_at.to(tl.int64)
            _store_page(codes, row, kept, words + index * (PAGE_BYTES // 4), T, D, BITS, KEYS)
            at = halves + index * (PAGE_BYTES // 2) + T * D * BITS // 16
            tl.store(at + tl.load(order + row), scale, mask=row >= kept)
        else:
            for start in range(0, moved, T):
                row = start + tl.arange(0, T)[:, None]
                codes, scale = _encode(
                    recent, row, row < moved, statistics, other, signs, table,
                    D, T, RULE, SLOPE, CELLS, INV_SQRT_DIM,
                )  # fmt: skip
                target = head.to(tl.int64) * tokens + n_packed + row
                store_codes(
                    codes, packed + target * ROW_BYTES, row < moved,
                    T, D, PLANES, False, None,
                )  # fmt: skip
                tl.store(scales + target, scale, mask=row < moved)
        _move_up(recent, rows - n_sinks - moved, moved, D, MOVE)
        n_dense -= moved
    if fits:
        r = tl.arange(0, Q)
        inside = (r < q)[:, None]
        new = tl.load(x + r[:, None] * x_row + d[None, :], mask=inside)
        tl.store(dense + (n_dense + r)[:, None] * D + d[None, :], new, mask=inside)


LENGTHS = [
    "batch", "q", "rows", "n_sinks", "page", "tokens", "other_k", "other_v", "programs",
]  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def window_append_kernel(
    k_dense, v_dense, k_packed, v_packed, k_words, v_words, k_halves, v_halves,
    k_scales, v_scales, k_statistics, v_statistics, counts,
    key, value, k_signs, v_signs, k_table, v_table, order,
    batch, q, rows, n_sinks, page, tokens, other_k, other_v, programs,
    key_b, key_h, key_q, value_b, value_h, value_q,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_RULE: tl.constexpr, V_RULE: tl.constexpr,
    K_SLOPE: tl.constexpr, V_SLOPE: tl.constexpr, K_CELLS: tl.constexpr, V_CELLS: tl.constexpr,
    K_INV_SQRT: tl.constexpr, V_INV_SQRT: tl.constexpr,
    K_PLANES: tl.constexpr, V_PLANES: tl.constexpr,
    K_ROW_BYTES: tl.constexpr, V_ROW_BYTES: tl.constexpr,
    SHIFTS: tl.constexpr, EQUALIZES: tl.constexpr, LEAST: tl.constexpr,
    PAGED: tl.constexpr, T: tl.constexpr, Q: tl.constexpr, MOVE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Append to the keys and values of one head. Grid: (B * Hkv, 2)."""
    head = tl.program_id(0)
    b = head // HKV
    h = head % HKV
    n_packed = tl.load(counts + b)
    n_dense = tl.load(counts + batch + b)
    moved = page - n_packed % page
    due = (n_dense + q > rows - page + moved) & (n_packed + moved <= tokens)
    fits = n_dense + q - tl.where(due, moved, 0) <= rows
    page_at = (b * (tokens // page) + n_packed // page) * HKV + h
    if tl.program_id(1) == 0:
        _append(
            k_dense, k_packed, k_words, k_halves, k_scales, k_statistics, other_k, k_signs,
            k_table, order, key + b.to(tl.int64) * key_b + h.to(tl.int64) * key_h, key_q,
            head, page_at, n_packed, n_dense, due, moved, fits, q, rows, n_sinks, page, tokens,
            SHIFTS, EQUALIZES, LEAST,
            D, K_BITS, K_RULE, K_SLOPE, K_CELLS, K_INV_SQRT, K_PLANES, K_ROW_BYTES,
            PAGED, True, T, Q, MOVE,
        )  # fmt: skip
    else:
        _append(
            v_dense, v_packed, v_words, v_halves, v_scales, v_statistics, other_v, v_signs,
            v_table, order, value + b.to(tl.int64) * value_b + h.to(tl.int64) * value_h, value_q,
            head, page_at, n_packed, n_dense, due, moved, fits, q, rows, n_sinks, page, tokens,
            SHIFTS, EQUALIZES, LEAST,
            DV, V_BITS, V_RULE, V_SLOPE, V_CELLS, V_INV_SQRT, V_PLANES, V_ROW_BYTES,
            PAGED, False, T, Q, MOVE,
        )  # fmt: skip
    tl.debug_barrier()  # every thread has read the counts
    finished = tl.atomic_add(counts + 3 * batch, 1)
    if finished == programs - 1:
        for start in range(0, batch, B):
            i = start + tl.arange(0, B)
            inside = i < batch
            packed = tl.load(counts + i, mask=inside, other=0)
            dense = tl.load(counts + batch + i, mask=inside, other=0)
            room = page - packed % page
            full = (dense + q > rows - page + room) & (packed + room <= tokens)
            left = tl.where(full, room, 0)
            taken = dense + q - left <= rows
            tl.store(counts + i, packed + left, mask=inside)
            tl.store(counts + batch + i, dense - left + tl.where(taken, q, 0), mask=inside)
            lost = tl.load(counts + 2 * batch + i, mask=inside, other=0)
            tl.store(counts + 2 * batch + i, lost + tl.where(taken, 0, q), mask=inside)
        tl.store(counts + 3 * batch, 0)
