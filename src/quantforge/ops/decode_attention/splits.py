"""The merge of splits: what programs of the fused kernel saw of the same query rows."""

from __future__ import annotations

import triton
import triton.language as tl

# Programmatic dependent launch (sm_90): programs sit there when the last split is written, and the
# next launch may come while they work; it waits itself for what it reads.
_WAIT = tl.constexpr("griddepcontrol.wait; // $0")
_RELEASE = tl.constexpr("griddepcontrol.launch_dependents; // $0")

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _dependency(INSTRUCTION: tl.constexpr):
    tl.inline_asm_elementwise(INSTRUCTION, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _logits(lse, slots, rows, row, slot):
    """Return log2-sum-exps (ROWS, slots) of query rows."""
    inside = (row < rows)[:, None] & (slot < slots)[None, :]
    at = lse + slot[None, :] * rows + row[:, None]
    return tl.load(at, mask=inside, other=float("-inf"))


@triton.jit
def _outputs(base, slots, rows, row, d, slot, DV: tl.constexpr):
    """Return outputs (ROWS, CHUNK, COLUMNS) of some slots; unwritten ones are anything."""
    at = base + (slot[None, :, None] * rows + row[:, None, None]) * DV + d[None, None, :]
    inside = (row < rows)[:, None] & (slot < slots)[None, :]
    return tl.load(at, mask=inside[:, :, None], other=0.0)


@triton.jit(do_not_specialize=["slots", "rows"])
def merge_kernel(
    partial, lse, out, out_lse, slots, rows,
    DV: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the splits of some columns of some query rows (arXiv 2205.14135, section 3.1).

    partial (B * Hkv, slots, rows, DV) and lse (B * Hkv, slots, rows), in units of log 2, become
    out (B * Hkv, rows, DV) and natural log-sum-exps. Grid: (rows / ROWS, DV / COLUMNS, B * Hkv).
    A launch this short is all latency: outputs are asked for before their weights are known.
    """
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    partial += head * slots * rows * DV
    lse += head * slots * rows
    chunk = tl.arange(0, CHUNK)
    slot = tl.arange(0, SPLITS)
    if PDL:
        _dependency(_RELEASE)
        _dependency(_WAIT)
    x = _outputs(partial, slots, rows, row, d, chunk, DV)
    logits = _logits(lse, slots, rows, row, slot)
    peak = tl.max(logits, 1)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(logits - anchor[:, None])
    mass = tl.sum(weights, 1)  # (ROWS,)
    mass = tl.where(mass > 0, mass, 1.0)  # nothing was visible: all weights are zero
    inverse = 1.0 / mass
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, slots, CHUNK):
        if SPLITS == CHUNK:
            w = weights
        else:
            w = tl.exp2(_logits(lse, slots, rows, row, start + chunk) - anchor[:, None])
        x = tl.where((w > 0)[:, :, None], x, 0.0)  # a slot that saw nothing was not written
        total += tl.sum(x * w[:, :, None], 1)
        if SPLITS > CHUNK:
            x = _outputs(partial, slots, rows, row, d, start + CHUNK + chunk, DV)
    at = head * rows + row
    total = total * inverse[:, None]
    target = out + at[:, None] * DV + d[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(row < rows)[:, None])
    if tl.program_id(1) == 0:
        tl.store(out_lse + at, (peak + tl.log2(mass)) * LN2, mask=row < rows)
