"""Many queries against packed rows: chunks of them through torch's dense attention kernels.

The history is decoded a chunk at a time, in rotated space and into one buffer; the rotated queries
of all heads that share a key head are rows of one head, as no mask tells them apart. Chunks merge
by their log-sum-exp (arXiv 2205.14135, section 3.1).

    for each chunk: decode_chunk, cuDNN or flash, merge_chunk

    memory     one chunk, whatever the length of the history
    traffic    codes once; a chunk is written and read once per 128 query rows, partly in L2
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from quantforge.ops import flash
from quantforge.ops.kernels.chunk import decode_chunk, merge_chunk
from quantforge.ops.launch import capability, multiprocessors
from quantforge.spec import QuantSpec

if TYPE_CHECKING:
    from quantforge.ops.attention.triton import Operand

MAX_FLASH_DIM = 256
MIN_ROWS = 129
"""Fewer query rows are better served by a kernel that splits the tokens over the GPU."""
FLASH_ROWS = 128
"""Query rows of one program of the flash kernel."""
DECODE_ROWS = 64
MERGE_ELEMENTS = 4096


def reason_against(query: torch.Tensor, n: int, k_spec: QuantSpec, v_spec: QuantSpec) -> str | None:
    """Return why grouped queries (B, Hkv, rows, dim) are not for the flash kernel, or None."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"queries are {query.dtype}"
    if capability(query.device)[0] < 8:
        return "the flash kernel needs an NVIDIA GPU of capability 8.0"
    if k_spec.dim != v_spec.dim or k_spec.dim % 8 or k_spec.dim > MAX_FLASH_DIM:
        return f"dims are {k_spec.dim} and {v_spec.dim}"
    if query.dtype == torch.float16 and "float32" in (k_spec.scale_dtype, v_spec.scale_dtype):
        return "decoded vectors may exceed the range of fp16"
    batch, heads, rows, _ = query.shape
    programs = batch * heads * triton.cdiv(rows, FLASH_ROWS)
    if n == 0 or rows < MIN_ROWS or 2 * programs < multiprocessors(query.device):
        return f"{rows} query rows of {batch * heads} heads do not fill the GPU"
    return None


def attend_in_chunks(
    query: torch.Tensor, dtype: torch.dtype, key: Operand, value: Operand, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from rotated float32 queries (B, Hkv, rows, dim) to all tokens.

    Returns float32 sums of scaled centroids in canonical order and natural log-sum-exp.
    """
    batch, heads, rows, dim = query.shape
    n = key.packed.shape[2]
    cut = flash.chunks(n, flash.longest_chunk(4 * dim * batch * heads, rows))
    capacity = max(length for _, length in cut)
    keys, values = query.new_empty((2, batch, heads, capacity, dim), dtype=dtype)
    out = torch.empty_like(query)
    lse = query.new_empty((batch, heads, rows))
    operands = query.to(dtype)
    columns = triton.next_power_of_2(dim)
    merge_rows = MERGE_ELEMENTS // columns
    for step, (first, length) in enumerate(cut):
        decode_chunk[(triton.cdiv(length, DECODE_ROWS), batch * heads, 2)](
            *(key.packed, key.scales, key.table, keys),
            *(value.packed, value.scales, value.table, values),
            *(first, length, capacity, heads),
            *key.strides,
            *value.strides,
            K=key.codes,
            V=value.codes,
            K_DIM=dim,
            V_DIM=dim,
            ROWS=DECODE_ROWS,
            num_warps=4,
        )
        part, part_lse = flash.attend(operands, keys[:, :, :length], values[:, :, :length], scale)
        merge_chunk[(triton.cdiv(rows, merge_rows), batch * heads)](
            *(out, lse, part, part_lse, rows, heads),
            *part.stride()[:3],
            *part_lse.stride(),
            DIM=dim,
            COLUMNS=columns,
            ROWS=merge_rows,
            IS_FIRST=step == 0,
            num_warps=4,
        )
    return out, lse
