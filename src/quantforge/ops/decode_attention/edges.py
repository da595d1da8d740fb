"""What stands before and behind the fused kernel: the query's rotation, and the merge of splits.

Both rotate a few rows by a dense matrix that stays in the L2 cache, one launch each.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Programmatic dependent launch (sm_90): the fused kernel starts while the projection runs, fetches
# its first pages, and waits before it reads the query.
_WAIT = tl.constexpr("griddepcontrol.wait; // $0")
_RELEASE = tl.constexpr("griddepcontrol.launch_dependents; // $0")

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FP16_HEADROOM = tl.constexpr(16384.0)


@triton.jit
def _dependency(INSTRUCTION: tl.constexpr):
    tl.inline_asm_elementwise(INSTRUCTION, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _rotate(x, matrix):
    """Return `x @ matrix` for an fp16 matrix and float32 x, itself in two fp16 terms."""
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    return tl.dot(high, matrix) + tl.dot(low, matrix)


@triton.jit(do_not_specialize=["rows", "q_len"])
def project_kernel(
    query, matrix, equalizer, shift, projected, query_scale, shift_logits,
    rows, q_len, scale, unit,
    query_b, query_h, query_q, eq_b, eq_h, shift_b, shift_h,
    HKV: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write `scale * log2(e) * R (equalizer * q)` in fp16, and `scale * log2(e) * q . shift`.

    Grid: (B * Hkv, D / COLUMNS, ROWS / 16). Rows beyond the query's are zero. 16 rows whose numbers
    might leave fp16 (a rotated number is at most the norm) are divided by a power of two,
    `query_scale`. R is `unit * matrix`.
    """
    head = tl.program_id(0)
    part = tl.program_id(1)
    if PDL:
        _dependency(_WAIT)
        _dependency(_RELEASE)  # only now: what follows may read what came before
    b = head // HKV
    h = head % HKV
    row = tl.program_id(2) * 16 + tl.arange(0, 16)
    d = tl.arange(0, D)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.load(matrix + column[None, :] * D + d[:, None])  # of R^T: (channel, rotated channel)
    inside = row < rows
    base = query + b.to(tl.int64) * query_b + h * (rows // q_len) * query_h
    at = base + (row // q_len * query_h + row % q_len * query_q)[:, None] + d[None, :]
    q = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32) * (scale * LOG2E)  # (16, D)
    if shift is not None and part == 0:
        centre = tl.load(shift + b * shift_b + h * shift_h + d).to(tl.float32)
        logits = tl.sum(q * centre[None, :], 1)
        tl.store(shift_logits + head * rows + row, logits, mask=inside)
    if equalizer is not None:
        q = q * tl.load(equalizer + b * eq_b + h * eq_h + d).to(tl.float32)[None, :]
    norm = tl.sqrt(tl.max(tl.sum(q * q, 1), 0))
    exponent = tl.ceil(tl.log2(tl.maximum(norm / FP16_HEADROOM, 1.0)))
    if part == 0:
        tl.store(query_scale + head * (ROWS // 16) + tl.program_id(2), tl.exp2(exponent))
    turned = _rotate(q * (tl.exp2(-exponent) * unit), r)  # (16, COLUMNS)
    at = projected + head.to(tl.int64) * ROWS * D + row[:, None] * D + column[None, :]
    tl.store(at, turned.to(tl.float16))


@triton.jit
def _slot_logits(lse, shift_logits, head, slots, dense_slots, rows, row, slot):
    """Return log2-sum-exps (ROWS, slots) of query rows, the key shift's logits included."""
    at = lse + (head.to(tl.int64) * slots + slot[None, :]) * rows + row[:, None]
    inside = (row < rows)[:, None] & (slot < slots)[None, :]
    logits = tl.load(at, mask=inside, other=float("-inf"))
    if shift_logits is not None:
        shifted = tl.load(shift_logits + head * rows + row, mask=row < rows, other=0.0)
        logits += tl.where((slot >= dense_slots)[None, :], shifted[:, None], 0.0)
    return logits


@triton.jit
def _outputs(base, slots, rows, row, d, slot, DV: tl.constexpr):
    """Return outputs (ROWS, CHUNK, DV) of some slots; unwritten ones are anything."""
    at = base + (slot[None, :, None] * rows + row[:, None, None]) * DV + d[None, None, :]
    inside = (row < rows)[:, None] & (slot < slots)[None, :]
    return tl.load(at, mask=inside[:, :, None], other=0.0)


@triton.jit(do_not_specialize=["slots", "dense_slots", "rows"])
def merge_kernel(
    partial, lse, shift_logits, matrix, equalizer, shift, out, out_lse,
    slots, dense_slots, rows, unit,
    eq_b, eq_h, shift_b, shift_h,
    HKV: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge what the splits of some query rows saw, and bring the packed part back to channels.

    `out = equalizer * R^T (sum of packed) + shift * (weight of packed) + sum of dense`; a key shift
    adds its logit to the packed log-sum-exps (arXiv 2205.14135, section 3.1, for the merge).
    Grid: (rows / ROWS, B * Hkv). R is `unit * matrix`. A launch this short is all latency: what
    does not depend on the launch before is read while it ends, outputs before their weights.
    """
    head = tl.program_id(1)
    b = head // HKV
    h = head % HKV
    d = tl.arange(0, DV)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r = tl.load(matrix + d[:, None] * DV + d[None, :])  # (rotated channel, channel)
    gain = 1.0
    if equalizer is not None:
        gain = tl.load(equalizer + b * eq_b + h * eq_h + d).to(tl.float32)[None, :]
    centre = 0.0
    if shift is not None:
        centre = tl.load(shift + b * shift_b + h * shift_h + d).to(tl.float32)[None, :]
    if PDL:
        _dependency(_WAIT)
    base = partial + head.to(tl.int64) * slots * rows * DV
    chunk = tl.arange(0, CHUNK)
    x = _outputs(base, slots, rows, row, d, chunk, DV)
    slot = tl.arange(0, SPLITS)
    logits = _slot_logits(lse, shift_logits, head, slots, dense_slots, rows, row, slot)
    peak = tl.max(logits, 1)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(logits - anchor[:, None])
    mass = tl.sum(weights, 1)  # (ROWS,)
    packed_mass = tl.sum(tl.where((slot >= dense_slots)[None, :], weights, 0.0), 1)
    mass = tl.where(mass > 0, mass, 1.0)  # nothing was visible: all weights are zero
    inverse = 1.0 / mass
    packed = tl.zeros((ROWS, DV), tl.float32)
    dense = tl.zeros((ROWS, DV), tl.float32)
    for start in range(0, slots, CHUNK):
        s = start + chunk
        if SPLITS == CHUNK:
            w = weights * inverse[:, None]
        else:
            w = _slot_logits(lse, shift_logits, head, slots, dense_slots, rows, row, s)
            w = tl.exp2(w - anchor[:, None]) * inverse[:, None]  # (ROWS, CHUNK)
        x = tl.where((w > 0)[:, :, None], x, 0.0)  # a slot that saw nothing was not written
        is_packed = (s >= dense_slots)[None, :]
        packed += tl.sum(x * tl.where(is_packed, w, 0.0)[:, :, None], 1)
        if start < dense_slots:
            dense += tl.sum(x * tl.where(is_packed, 0.0, w)[:, :, None], 1)
        if SPLITS > CHUNK:
            x = _outputs(base, slots, rows, row, d, s + CHUNK, DV)
    # a tensor core wants 16 rows: fewer are repeated
    COPIES: tl.constexpr = 16 // ROWS
    wide = tl.broadcast_to((packed * unit)[None, :, :], (COPIES, ROWS, DV))
    turned = tl.reshape(_rotate(tl.reshape(wide, (16, DV)), r), (COPIES, ROWS, DV))
    x = tl.sum(turned, 0) * (1.0 / COPIES) * gain + (packed_mass * inverse)[:, None] * centre
    # out is (B, Hq, q, DV): the rows of a head are its query heads, and their queries
    target = out + (head.to(tl.int64) * rows + row[:, None]) * DV + d[None, :]
    tl.store(target, (x + dense).to(out.dtype.element_ty), mask=(row < rows)[:, None])
    tl.store(out_lse + head * rows + row, (peak + tl.log2(mass)) * LN2, mask=row < rows)
