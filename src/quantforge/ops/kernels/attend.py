"""Attention over packed rows: each program takes some query rows of one head through some tokens.

    program (split, tile of query rows, batch * kv head)
    query rows     (q_per_kv * q, width)    all query heads of a key head, so codes are read once
    a tile         S = Q K^T                parts of bytes contract apart: (M, columns) (columns, N)
                   acc[part] += P V[part]   (M, N) (N, columns)

Queries arrive rotated, equalized and in the order of columns (`byte_lookup.basis`), in float32;
outputs leave as sums of centroids in that order. Scales multiply S and P, never decoded values.

Operands are float32 ("ieee") or fp16. fp16 cannot overflow: a row of Q is divided by a power of two
that leaves it below 2, and P times the scales of values by the greatest such scale so far. A row of
Q is two fp16 terms: equalizers make logits large, and one term would be off by 2^-11 of them.

Logits are kept in units of log 2. A row that has seen no key has m = -inf and mass 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.byte_lookup import centroids_of, load_registers

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_query(row, live, CODES: tl.constexpr):
    """Return the parts of the query rows (M, columns), float32."""
    PARTS: tl.constexpr = CODES.parts
    COLUMNS: tl.constexpr = CODES.columns
    columns = tl.arange(0, COLUMNS)[None, :]
    parts = ()
    for part in tl.static_range(PARTS):
        parts = parts + (tl.load(row + part * COLUMNS + columns, mask=live, other=0.0),)
    return parts


@triton.jit
def _power_of_two(x):
    """Return the power of two below x >= 0 and its inverse; 0 gives (0, 2^127)."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _biased(
    logits, mask_ptr, query_row, tokens, live, later_than,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return logits with the mask added, -inf for tokens that do not exist or are not seen."""
    seen = live[None, :]
    if MASK == "bool":
        seen = seen & (tl.load(mask_ptr, mask=query_row & seen, other=0) != 0)
    elif MASK == "float":
        bias = tl.load(mask_ptr, mask=query_row & seen, other=0.0)
        logits += bias.to(tl.float32) * LOG2E
    if CAUSAL:
        seen = seen & (tokens[None, :] <= later_than[:, None])
    return tl.where(seen, logits, float("-inf"))


@triton.jit(do_not_specialize=["n"])
def attend(
    query, k_packed, k_scales, k_table, v_packed, v_scales, v_table, mask, out, lse,
    rows, length, n, per_split, kv_heads, q_per_kv, scale,
    k_batch, k_head, k_row, ks_batch, ks_head, ks_row,
    v_batch, v_head, v_row, vs_batch, vs_head, vs_row,
    mask_batch, mask_head, mask_query, mask_token,
    K: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, FINAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    page_table=None, seqlens=None, table_row=0, PAGE: tl.constexpr = 0,
):  # fmt: skip
    """Attend to `per_split` tokens; write normalized sums (splits, heads, rows, V.width) and lse.

    Strides of packed rows are in units of their alignment. lse is in units of log 2, with FINAL
    natural. With PAGE, the tokens of a page, "batch" strides are those of pages; sequence b has the
    pages `page_table[b]` and `seqlens[b]` tokens, at most n, which its splits share out.
    Instructions per code besides lookups: see `attention.triton`.
    """
    PARTS: tl.constexpr = K.parts
    V_PARTS: tl.constexpr = V.parts
    K_COLUMNS: tl.constexpr = K.columns
    V_COLUMNS: tl.constexpr = V.columns
    K_ALIGNMENT: tl.constexpr = K.alignment
    V_ALIGNMENT: tl.constexpr = V.alignment
    head = tl.program_id(2).to(tl.int64)
    batch, kv_head = head // kv_heads, head % kv_heads
    r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live_row = (r < rows)[:, None]
    query_row = query + (head * rows + r[:, None]) * (PARTS * K_COLUMNS)
    q = _load_query(query_row, live_row, K)
    to_log2 = tl.cast(scale, tl.float32) * LOG2E
    row_factor = tl.full((BLOCK_M,), 1.0, tl.float32) * to_log2
    if HALF:
        peak = tl.max(tl.abs(q[0]), 1)
        for part in tl.static_range(1, PARTS):
            peak = tl.maximum(peak, tl.max(tl.abs(q[part]), 1))
        power, inverse = _power_of_two(peak)
        row_factor = row_factor * power
        halves, rests = (), ()
        for part in tl.static_range(PARTS):
            x = q[part] * inverse[:, None]
            half = x.to(tl.float16)
            halves = halves + (half,)
            rests = rests + ((x - half.to(tl.float32)).to(tl.float16),)
        q = halves

    if PAGE:
        n = tl.minimum(n, tl.load(seqlens + batch))
        per_split = tl.cdiv(tl.maximum(n, 0), BLOCK_N * tl.num_programs(0)) * BLOCK_N
        page_row = page_table + batch * table_row
        origin = batch * 0
    else:
        origin = batch
    first = tl.program_id(0) * per_split
    last = tl.minimum(first + per_split, n)
    token = tl.arange(0, BLOCK_N)
    k_base = k_packed + (origin * k_batch + kv_head * k_head) * K_ALIGNMENT
    v_base = v_packed + (origin * v_batch + kv_head * v_head) * V_ALIGNMENT
    k_base = tl.multiple_of(k_base, K_ALIGNMENT)
    v_base = tl.multiple_of(v_base, V_ALIGNMENT)
    ks_base = k_scales + origin * ks_batch + kv_head * ks_head
    vs_base = v_scales + origin * vs_batch + kv_head * vs_head
    k_columns = tl.arange(0, K_COLUMNS)[:, None]
    v_columns = tl.arange(0, V_COLUMNS)[None, :]
    position = r % length
    if MASK != "none":
        query_head = kv_head * q_per_kv + r // length
        mask_row = batch * mask_batch + query_head * mask_head + position * mask_query
        mask_row = mask + mask_row[:, None]  # (M, 1)
    else:
        mask_row = mask
    k_registers = load_registers(k_table, K)
    v_registers = load_registers(v_table, V)

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = (tl.zeros((BLOCK_M, V_COLUMNS), tl.float32),) * V_PARTS
    top = tl.zeros((1,), tl.float32)  # greatest scale of values so far
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        tokens = start + token
        live = tokens < last
        step = tokens.to(tl.int64)
        k_at, ks_at, v_at, vs_at = step * k_row, step * ks_row, step * v_row, step * vs_row
        if PAGE:
            page = tl.load(page_row + tokens // PAGE, mask=live, other=0).to(tl.int64)
            place = step % PAGE
            k_at, ks_at = page * k_batch + place * k_row, page * ks_batch + place * ks_row
            v_at, vs_at = page * v_batch + place * v_row, page * vs_batch + place * vs_row
        k_rows = k_base + (k_at * K_ALIGNMENT)[None, :]
        keys = centroids_of(k_rows, live[None, :], k_columns, k_table, k_registers, K)
        ks = tl.load(ks_base + ks_at, mask=live, other=0.0).to(tl.float32)
        v_rows = v_base + (v_at * V_ALIGNMENT)[:, None]
        values = centroids_of(v_rows, live[:, None], v_columns, v_table, v_registers, V)
        vs = tl.load(vs_base + vs_at, mask=live, other=0.0).to(tl.float32)

        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for part in tl.static_range(PARTS):
            if HALF:
                s = tl.dot(rests[part], keys[part], s)
            s = tl.dot(q[part], keys[part], s, input_precision="ieee")
        if HALF:
            s = s * ks[None, :] * row_factor[:, None]
        else:
            s = s * (ks * to_log2)[None, :]
        if MASK != "none":
            mask_here = mask_row + (step * mask_token)[None, :]
        else:
            mask_here = mask_row
        s = _biased(s, mask_here, live_row, tokens, live, position, MASK, CAUSAL)

        new_m = tl.maximum(m, tl.max(s, 1))
        reference = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(s - reference[:, None])
        correction = tl.exp2(m - reference)
        mass = mass * correction + tl.sum(p, 1)
        m = new_m
        if HALF:
            new_top = tl.maximum(top, tl.max(tl.abs(vs), 0))
            unit = tl.where(new_top > 0, new_top, 1.0)
            correction = correction * (top / unit)
            w = (p * (vs[None, :] / unit[:, None])).to(tl.float16)
            top = new_top
        else:
            w = p * vs[None, :]
        sums = ()
        for part in tl.static_range(V_PARTS):
            total = acc[part] * correction[:, None]
            sums = sums + (tl.dot(w, values[part], total, input_precision="ieee"),)
        acc = sums

    safe = tl.where(mass > 0, mass, 1.0)
    line = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + head) * rows + r
    target = out + line[:, None] * (V_PARTS * V_COLUMNS) + v_columns
    for part in tl.static_range(V_PARTS):
        result = acc[part] / safe[:, None]
        if HALF:
            result = result * top[None, :]
        tl.store(target + part * V_COLUMNS, result, mask=live_row)
    total = tl.where(mass > 0, m + tl.log2(safe), float("-inf"))
    if FINAL:
        total = total * LN2
    tl.store(lse + line, total, mask=r < rows)


@triton.jit(do_not_specialize=["splits", "lines"])
def merge_splits(
    partial, partial_lse, out, lse, lines, splits,
    SPLITS_PADDED: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row: partial (splits, lines, WIDTH), lse in units of log 2."""
    line = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_PADDED).to(tl.int64)
    parts = tl.load(partial_lse + split * lines + line, mask=split < splits, other=float("-inf"))
    peak = tl.max(parts, 0)
    reference = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.sum(tl.exp2(parts - reference), 0)
    safe = tl.where(mass > 0, mass, 1.0)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in tl.range(0, splits, STEP):
        some = first + tl.arange(0, STEP).to(tl.int64)
        live = some < splits
        part = tl.load(partial_lse + some * lines + line, mask=live, other=float("-inf"))
        weight = tl.exp2(part - reference)
        source = partial + (some * lines + line)[:, None] * WIDTH + column[None, :]
        total += tl.sum(tl.load(source, mask=live[:, None], other=0.0) * weight[:, None], 0)
    tl.store(out + line * WIDTH + column, total / safe)
    tl.store(lse + line, tl.where(mass > 0, reference + tl.log2(safe), float("-inf")) * LN2)
