"""What stands before and behind the fused kernel: the query's rotation, and the merge of splits.

Both rotate a few rows by a dense matrix that stays in the L2 cache, one launch each.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Programmatic dependent launch (sm_90): a kernel starts while the one before it runs, and waits here
# before it reads what that wrote.
_WAIT = tl.constexpr("griddepcontrol.wait; // $0")
_RELEASE = tl.constexpr("griddepcontrol.launch_dependents; // $0")

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FP16_HEADROOM = tl.constexpr(16384.0)


@triton.jit
def _dependency(INSTRUCTION: tl.constexpr):
    tl.inline_asm_elementwise(INSTRUCTION, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["rows", "q_len"])
def project_kernel(
    query, matrix, equalizer, shift, projected, query_scale, shift_logits,
    rows, q_len, scale,
    query_b, query_h, query_q, eq_b, eq_h, shift_b, shift_h,
    HKV: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write `scale * log2(e) * R (equalizer * q)` in fp16, and `scale * log2(e) * q . shift`.

    Grid: (B * Hkv, D / COLUMNS, ROWS / 16). Rows beyond the query's are zero. 16 rows whose numbers might leave
    fp16 (a rotated number is at most the norm) are divided by a power of two, `query_scale`.
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
    inside = row < rows
    base = query + b.to(tl.int64) * query_b + h * (rows // q_len) * query_h
    at = base + (row // q_len * query_h + row % q_len * query_q)[:, None] + d[None, :]
    q = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32) * (scale * LOG2E)  # (ROWS, D)
    if shift is not None:
        if part == 0:
            centre = tl.load(shift + b * shift_b + h * shift_h + d).to(tl.float32)
            logits = tl.sum(q * centre[None, :], 1)
            tl.store(shift_logits + head * rows + row, logits, mask=inside)
    if equalizer is not None:
        q = q * tl.load(equalizer + b * eq_b + h * eq_h + d).to(tl.float32)[None, :]
    norm = tl.sqrt(tl.max(tl.sum(q * q, 1), 0))
    exponent = tl.ceil(tl.log2(tl.maximum(norm / FP16_HEADROOM, 1.0)))
    if part == 0:
        tl.store(query_scale + head * (ROWS // 16) + tl.program_id(2), tl.exp2(exponent))
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.load(matrix + column[None, :] * D + d[:, None])  # of R^T: (channel, rotated channel)
    turned = tl.dot(q, r, input_precision="tf32x3") * tl.exp2(-exponent)  # (ROWS, COLUMNS)
    at = projected + head.to(tl.int64) * ROWS * D + row[:, None] * D + column[None, :]
    tl.store(at, turned.to(tl.float16))


@triton.jit
def _split_weights(lse, shift_logits, head, splits, packed_splits, rows, row, split):
    """Return log2-sum-exps of some splits of a query row, the key shift's logit included."""
    at = lse + head.to(tl.int64) * splits * rows + split * rows + row
    logits = tl.load(at, mask=split < splits, other=float("-inf"))
    if shift_logits is not None:
        shifted = tl.load(shift_logits + head * rows + row)
        logits += tl.where(split < packed_splits, shifted, 0.0)
    return logits


@triton.jit(do_not_specialize=["splits", "packed_splits", "rows"])
def merge_kernel(
    partial, lse, shift_logits, matrix, equalizer, shift, out, out_lse,
    splits, packed_splits, rows,
    eq_b, eq_h, shift_b, shift_h,
    HKV: tl.constexpr, DV: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query row, and bring what the packed ones saw back to channels.

    `out = equalizer * R^T (sum of packed) + shift * (weight of packed) + sum of dense`; a key shift
    adds its logit to the packed log-sum-exps (arXiv 2205.14135, section 3.1, for the merge).
    Grid: (rows, B * Hkv).
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    b = head // HKV
    h = head % HKV
    if PDL:
        _dependency(_WAIT)
        _dependency(_RELEASE)
    split = tl.arange(0, SPLITS)
    logits = _split_weights(lse, shift_logits, head, splits, packed_splits, rows, row, split)
    peak = tl.max(logits, 0)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(logits - anchor)
    mass = tl.sum(weights, 0)
    packed_mass = tl.sum(tl.where(split < packed_splits, weights, 0.0), 0)
    inverse = tl.where(mass > 0, 1.0 / mass, 0.0)
    base = partial + (head.to(tl.int64) * splits * rows + row) * DV
    d = tl.arange(0, DV)
    packed = tl.zeros((DV,), tl.float32)
    for start in range(0, packed_splits, CHUNK):
        s = start + tl.arange(0, CHUNK)
        w = _split_weights(lse, shift_logits, head, splits, packed_splits, rows, row, s)
        w = tl.where(s < packed_splits, tl.exp2(w - anchor), 0.0)
        at = base + s[:, None] * (rows * DV) + d[None, :]
        packed += tl.sum(tl.load(at, mask=(w > 0)[:, None], other=0.0) * w[:, None], 0)
    # out is (B, Hq, q, DV): the rows of a head are its query heads, and their queries
    target = out + (head.to(tl.int64) * rows + row) * DV
    for first in range(0, DV, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        r = tl.load(matrix + d[:, None] * DV + column[None, :])  # (rotated channel, channel)
        x = tl.sum(packed[:, None] * r, 0)
        if equalizer is not None:
            x = x * tl.load(equalizer + b * eq_b + h * eq_h + column).to(tl.float32)
        if shift is not None:
            x = x + packed_mass * tl.load(shift + b * shift_b + h * shift_h + column).to(tl.float32)
        for dense in range(packed_splits, splits):
            w = _split_weights(lse, shift_logits, head, splits, packed_splits, rows, row, dense)
            w = tl.exp2(w - anchor)
            seen = w > 0
            x += w * tl.load(base + dense * (rows * DV) + column, mask=seen, other=0.0)
        tl.store(target + column, (x * inverse).to(out.dtype.element_ty))
    tl.store(out_lse + head * rows + row, (peak + tl.log2(mass)) * LN2)
