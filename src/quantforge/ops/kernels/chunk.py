"""A chunk of the history for a dense attention kernel: decode it, and merge what comes back.

Rows are decoded in rotated space, `scale * centroid`, since queries are rotated instead; channels
are in the canonical order. A chunk stays in the L2 cache between the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.byte_lookup import centroids_of, load_registers


@triton.jit
def _decode(
    packed, scales, table, out, first, n, capacity, head, kv_heads,
    batch_stride, head_stride, row_stride, s_batch, s_head, s_row,
    CODES: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = CODES.parts
    STRIDE: tl.constexpr = CODES.stride
    COLUMNS: tl.constexpr = CODES.columns
    ALIGNMENT: tl.constexpr = CODES.alignment
    batch, kv_head = head // kv_heads, head % kv_heads
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = local < n
    token = first.to(tl.int64) + local
    base = packed + (batch * batch_stride + kv_head * head_stride) * ALIGNMENT
    rows = tl.multiple_of(base, ALIGNMENT) + (token * row_stride * ALIGNMENT)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    registers = load_registers(table, CODES)
    parts = centroids_of(rows, live[:, None], columns, table, registers, CODES)
    scale_row = scales + batch * s_batch + kv_head * s_head + token * s_row
    scale = tl.load(scale_row, mask=live, other=0.0).to(tl.float32)
    target = out + (head * capacity + local)[:, None] * DIM + columns
    for part in tl.static_range(PARTS):
        x = parts[part].to(tl.float32) * scale[:, None]
        inside = live[:, None] & (columns < min(STRIDE, DIM - part * STRIDE))
        tl.store(target + part * STRIDE, x.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "n"])
def decode_chunk(
    k_packed, k_scales, k_table, k_out, v_packed, v_scales, v_table, v_out,
    first, n, capacity, kv_heads,
    k_batch, k_head, k_row, ks_batch, ks_head, ks_row,
    v_batch, v_head, v_row, vs_batch, vs_head, vs_row,
    K: tl.constexpr, V: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Decode tokens first .. first + n - 1 of all heads to (heads, capacity, dim).

    The last axis of the grid is 0 for keys, 1 for values.
    """
    head = tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        _decode(
            k_packed, k_scales, k_table, k_out, first, n, capacity, head, kv_heads,
            k_batch, k_head, k_row, ks_batch, ks_head, ks_row, K, K_DIM, ROWS,
        )  # fmt: skip
    else:
        _decode(
            v_packed, v_scales, v_table, v_out, first, n, capacity, head, kv_heads,
            v_batch, v_head, v_row, vs_batch, vs_head, vs_row, V, V_DIM, ROWS,
        )  # fmt: skip


@triton.jit
def merge_chunk(
    out, lse, part, part_lse, rows, heads,
    part_batch, part_head, part_row, lse_batch, lse_head, lse_row,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, IS_FIRST: tl.constexpr,
):  # fmt: skip
    """Merge attention over a chunk into out (batch * heads, rows, DIM) and natural lse, float32.

    IS_FIRST writes without reading: out may hold anything.
    """
    index = tl.program_id(1).to(tl.int64)
    batch, head = index // heads, index % heads
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < rows
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = live[:, None] & (columns < DIM)
    step = r.to(tl.int64)
    source = part + batch * part_batch + head * part_head + (step * part_row)[:, None] + columns
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    source_lse = part_lse + batch * lse_batch + head * lse_head + step * lse_row
    new = tl.load(source_lse, mask=live, other=float("-inf"))
    target = out + (index * rows + step)[:, None] * DIM + columns
    target_lse = lse + index * rows + step
    if not IS_FIRST:
        old = tl.load(target_lse, mask=live, other=float("-inf"))
        y = tl.load(target, mask=mask, other=0.0)
        peak = tl.maximum(old, new)
        old_weight, new_weight = tl.exp(old - peak), tl.exp(new - peak)
        total = old_weight + new_weight
        x = x * (new_weight / total)[:, None] + y * (old_weight / total)[:, None]
        new = peak + tl.log(total)
    tl.store(target, x, mask=mask)
    tl.store(target_lse, new, mask=live)
