"""Attention over pages by the kernel for rows, which looks each row's page up.

Programs of a sequence share its own tokens out among them, so short sequences beside long ones, or
in a graph that was captured for the longest, keep all of them busy.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from quantforge.ops.attention import triton as rows_of
from quantforge.ops.kernels import byte_lookup
from quantforge.ops.kernels.attend import attend, merge_splits
from quantforge.ops.launch import multiprocessors
from quantforge.ops.statistics import equalize_query, restore
from quantforge.spec import QuantSpec


def supports(query: torch.Tensor, *args: Any) -> str | None:
    """Return why these arguments are not for the kernel, or None."""
    keys_values, scale_and_specs = args[:8], args[-3:]
    return rows_of.supports(*(query, *keys_values, None, False, *scale_and_specs))


def paged_attention(
    query: torch.Tensor,
    k_packed: torch.Tensor,
    k_scales: torch.Tensor,
    k_shift: torch.Tensor | None,
    k_equalizer: torch.Tensor | None,
    v_packed: torch.Tensor,
    v_scales: torch.Tensor,
    v_shift: torch.Tensor | None,
    v_equalizer: torch.Tensor | None,
    page_table: torch.Tensor,
    seqlens: torch.Tensor,
    n_tokens: int,
    scale: float,
    k_spec_key: str,
    v_spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::paged_attention` on a GPU; operands as `attention` has them."""
    k_spec, v_spec = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    kv_heads, page_size = k_packed.shape[1:3]
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    batch, heads, length, _ = query.shape
    rows = heads // kv_heads * length
    grouped = query.reshape(batch, kv_heads, rows, k_spec.dim)
    half = query.dtype in (torch.float16, torch.bfloat16)
    key = rows_of.operand_of(k_packed, k_scales, k_spec, half)
    value = rows_of.operand_of(v_packed, v_scales, v_spec, half)
    rotated = equalize_query(grouped, k_equalizer) @ byte_lookup.basis(k_spec, query.device).T
    sums = query.new_empty((batch, kv_heads, rows, value.codes.width), dtype=torch.float32)
    lse = query.new_empty((batch, kv_heads, rows), dtype=torch.float32)
    if lse.numel():
        tuning = rows_of.tuning_of(rows, key.codes, value.codes, half)
        row_tiles = triton.cdiv(rows, tuning.block_m)
        programs = batch * kv_heads * row_tiles
        wanted = max(1, multiprocessors(query.device) * tuning.programs // programs)
        splits = max(1, min(wanted, triton.cdiv(n_tokens, tuning.block_n)))
        partial, partial_lse = sums, lse
        if splits > 1:
            partial = sums.new_empty((splits, *sums.shape))
            partial_lse = lse.new_empty((splits, *lse.shape))
        attend[(splits, row_tiles, batch * kv_heads)](
            rotated.contiguous(),
            *(key.packed, key.scales, key.table),
            *(value.packed, value.scales, value.table),
            *(lse, partial, partial_lse),
            *(rows, length, n_tokens, 0, kv_heads, rows // length, float(scale)),
            *key.strides,
            *value.strides,
            *(0, 0, 0, 0),
            K=key.codes,
            V=value.codes,
            HALF=half,
            MASK="none",
            CAUSAL=False,
            FINAL=splits == 1,
            BLOCK_M=tuning.block_m,
            BLOCK_N=tuning.block_n,
            STAGES=tuning.stages,
            page_table=page_table,
            seqlens=seqlens.contiguous(),
            table_row=page_table.stride(0),
            PAGE=page_size,
            num_warps=tuning.num_warps,
        )
        if splits > 1:
            lines = batch * kv_heads * rows
            merge_splits[(lines,)](
                *(partial, partial_lse, sums, lse, lines, splits),
                SPLITS_PADDED=triton.next_power_of_2(splits),
                STEP=rows_of.MERGE_STEP,
                WIDTH=value.codes.width,
                num_warps=1 if value.codes.width <= 128 else 2,
            )
    seen = None if v_shift is None else (lse > -torch.inf).to(torch.float32).unsqueeze(-1)
    out = restore(sums @ byte_lookup.basis(v_spec, query.device), v_shift, v_equalizer, seen)
    if k_shift is not None:
        lse = lse + (grouped.to(torch.float32) * k_shift.to(torch.float32)).sum(-1) * scale
    return out.view(*query.shape[:-1], v_spec.dim), lse.view(query.shape[:-1])
