"""Attention over a dense segment with its log-sum-exp, and the merge of segments.

Two segments with outputs o_i and log-sum-exps l_i combine exactly to
`sum_i exp(l_i - l) o_i` with `l = log sum_i exp(l_i)` (arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MAX_LOGITS = 1 << 24
"""Logits held at once by the unfused path: 64 MiB of float32."""
MAX_FLASH_DIM = 256
FLASH_ALIGNMENT = 8
"""Half numbers in 16 bytes, which the flash kernel loads at once."""

Partial = tuple[torch.Tensor, torch.Tensor]
"""Output (B, Hq, q, dim) and natural log-sum-exp (B, Hq, q)."""


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> Partial:
    """Attend from query (B, Hq, q, dim) to dense K and V (B, Hkv, n, dim).

    Query heads that share a key head are folded into rows, so keys are never repeated. A query
    whose keys are all masked gives -inf as log-sum-exp; its output is then meaningless. With a
    softcap logits become `softcap * tanh(logits / softcap)`, which no flash kernel of torch does.
    """
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, -1, query.shape[-1])
    if mask is not None:
        mask = _grouped_mask(mask, batch, heads, kv_heads, length)
    if softcap:
        out, lse = _matmul_softmax(grouped, key, value, mask, scale, softcap)
    elif query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        out, lse = _flash_cpu(grouped, key, value, mask, scale)
    elif mask is None and fits_flash(grouped, key, value):
        out, lse = _flash_cuda(grouped, key, value, scale)
    else:
        out, lse = _matmul_softmax(grouped, key, value, mask, scale, softcap)
    return out.reshape(batch, heads, length, -1), lse.reshape(batch, heads, length)


def _grouped_mask(
    mask: torch.Tensor, batch: int, heads: int, kv_heads: int, length: int
) -> torch.Tensor:
    """Return the mask as (B, Hkv or 1, q_per_kv * q, n)."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    n, q_per_kv = mask.shape[-1], heads // kv_heads
    if mask.shape[1] == 1:
        full = mask.unsqueeze(2).expand(-1, 1, q_per_kv, length, n)
    else:
        full = mask.expand(-1, heads, length, n).unflatten(1, (kv_heads, q_per_kv))
    return full.flatten(2, 3).expand(batch, -1, -1, -1)


def _flash_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> Partial:
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out, lse = op(query, key, value, attn_mask=mask, scale=scale)
    if mask is not None:  # the kernel says 0 where every key is masked
        lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
    return out, lse


def fits_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether the flash kernel for NVIDIA takes unmasked operands (B, H, n, dim)."""
    if query.device.type != "cuda" or torch.version.hip is not None:
        return False
    dim = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and dim == value.shape[-1]
        and dim % FLASH_ALIGNMENT == 0
        and dim <= MAX_FLASH_DIM
        and query.numel() > 0
        and key.numel() > 0
        and torch.cuda.get_device_properties(query.device).major >= 8
    )


def _flash_cuda(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> Partial:
    op = torch.ops.aten._scaled_dot_product_flash_attention.default
    result = op(aligned(query), aligned(key), aligned(value), scale=scale)
    return result[0], result[1]


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x with rows that the flash kernel can load: adjacent, at multiples of 16 bytes."""
    starts = (x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) == 1 and not any(start % FLASH_ALIGNMENT for start in starts):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _matmul_softmax(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> Partial:
    """Unfused, a few query rows at a time, in float32."""
    key, value = key.to(torch.float32), value.to(torch.float32)
    step = max(1, MAX_LOGITS // max(1, key.shape[:-1].numel()))
    outs, lses = [], []
    for start in range(0, query.shape[2], step):
        rows = slice(start, start + step)
        logits = (query[:, :, rows].to(torch.float32) * scale) @ key.mT
        if softcap:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            tile = mask[:, :, rows]
            bias = logits.masked_fill_(~tile, -torch.inf) if tile.dtype == torch.bool else tile
            logits = bias if bias is logits else logits.add_(bias)
        lse = logits.logsumexp(-1)
        finite = torch.where(lse == -torch.inf, 0.0, lse)
        outs.append(logits.sub_(finite.unsqueeze(-1)).exp_() @ value)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def merge_partials(partials: Sequence[Partial]) -> torch.Tensor:
    """Merge attention over several segments; returns the output in float32."""
    lses = torch.stack([lse.to(torch.float32) for _, lse in partials])
    peak = lses.amax(0)
    weights = (lses - torch.where(peak == -torch.inf, 0.0, peak)).exp_()
    weights = weights / weights.sum(0).clamp_min_(torch.finfo(torch.float32).tiny)
    total = torch.zeros((), device=lses.device)
    for (out, _), weight in zip(partials, weights, strict=True):
        weight = weight.unsqueeze(-1)
        total = total + torch.where(weight > 0, out.to(torch.float32) * weight, 0.0)
    return total
