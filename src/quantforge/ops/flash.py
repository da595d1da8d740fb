"""Dense attention kernels of torch that return the log-sum-exp, for chunks of decoded history."""

from __future__ import annotations

import torch

from quantforge.ops.launch import capability
from quantforge.ops.merge import Partial, aligned

HOPPER = 9
MIN_CUDNN = 90100
"""cuDNN 9.1, the first whose attention for Hopper torch uses by itself."""
CUDNN_TOKENS = 64
"""cuDNN builds a plan for each number of keys; of other numbers the rest goes to flash."""
MAX_CUDNN_DIM = 128
MIN_CUDNN_TOKENS = 1024
"""Fewer are not worth a plan."""


def cudnn_tokens(query: torch.Tensor, n: int) -> int:
    """Return how many of n keys are for cuDNN, the first of them: 0 where it is not the faster."""
    if capability(query.device)[0] != HOPPER or query.shape[-1] > MAX_CUDNN_DIM:
        return 0
    if not torch.backends.cudnn.is_available() or torch.backends.cudnn.version() < MIN_CUDNN:
        return 0
    return n // CUDNN_TOKENS * CUDNN_TOKENS if n >= MIN_CUDNN_TOKENS else 0


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    is_causal: bool = False,
) -> Partial:
    """Attend by FlashAttention 2; is_causal aligns the last query with the last key.

    Query (B, Hq, q, dim), key and value (B, Hkv, n, dim), half, channels adjacent; Hq is a multiple
    of Hkv.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention.default(
        aligned(query), aligned(key), aligned(value), is_causal=is_causal, scale=scale
    )[:2]
    return out, lse


def cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Partial:
    """Attend by cuDNN, without a mask; arguments as those of `flash`."""
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        query, key, value, None, True, scale=scale
    )[:2]
    return out, lse.view(query.shape[:-1])  # (B, H, rows, 1) in some versions


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> list[Partial]:
    """Attend to all keys by the fastest kernel, in one part or two; arguments as of `flash`."""
    n = key.shape[2]
    many = cudnn_tokens(query, n)
    parts = []
    if many:
        parts.append(cudnn(query, key[:, :, :many], value[:, :, :many], scale))
    if many < n:
        parts.append(flash(query, key[:, :, many:], value[:, :, many:], scale))
    return parts
