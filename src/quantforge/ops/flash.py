"""Dense attention kernels of torch that return the log-sum-exp, for chunks of decoded history."""

from __future__ import annotations

import torch

from quantforge.ops.launch import capability
from quantforge.ops.merge import Partial, aligned

HOPPER = 9
MIN_CUDNN = 90100
"""cuDNN 9.1, the first whose attention for Hopper torch uses by itself."""
MAX_CUDNN_DIM = 128
MIN_CUDNN_TOKENS = 512
"""Fewer are as fast by flash, with the merge that one more part needs."""
# NVIDIA H200, triton 3.6.0, 2026-11-24: 2048 query rows of 8 key heads, dim 128, 32768 tokens:
# 596, 544, 513, 521 and 520 us with chunks of 16, 32, 64, 128 and 256 MiB
CHUNK_BYTES = 64 << 20
"""Decoded keys and values of one chunk."""
MAX_CHUNK_BYTES = 128 << 20
"""Of one chunk where there are many query rows: each chunk writes an output for all of them."""
MIN_CHUNK = 1024


def has_cudnn(query: torch.Tensor) -> bool:
    """Return whether cuDNN's kernel runs, and is the faster one, for query (B, H, rows, dim)."""
    if capability(query.device)[0] != HOPPER or query.shape[-1] > MAX_CUDNN_DIM:
        return False
    return torch.backends.cudnn.is_available() and torch.backends.cudnn.version() >= MIN_CUDNN


def longest_chunk(token_bytes: int, rows: int) -> int:
    """Return the most tokens of a chunk, a power of two.

    `token_bytes` is what a token's decoded keys and values take, all heads together; `rows` are the
    query rows of a key head.
    """
    by_rows = min(2 * rows, MAX_CHUNK_BYTES // token_bytes)
    tokens = max(CHUNK_BYTES // token_bytes, by_rows, MIN_CHUNK)
    return 1 << (tokens.bit_length() - 1)


def chunks(n: int, longest: int) -> list[tuple[int, int]]:
    """Cut n tokens into (first, length): the longest, powers of two below, a rest; the last first.

    cuDNN builds a plan for each length that it meets (80 ms on an H200), so lengths come from few,
    whatever n. The last and shortest comes first: nothing runs beside its decoding.
    """
    cut = []
    first, length = 0, longest
    while first < n:
        if n - first >= length:
            cut.append((first, length))
            first += length
        elif length >= 2 * MIN_CUDNN_TOKENS:
            length //= 2
        else:
            cut.append((first, n - first))
            break
    return cut[::-1]


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


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Partial:
    """Attend to all keys by the fastest kernel; arguments as of `flash`.

    cuDNN only meets numbers of keys that are powers of two.
    """
    n = key.shape[2]
    if n >= MIN_CUDNN_TOKENS and n & (n - 1) == 0 and has_cudnn(query):
        return cudnn(query, key, value, scale)
    return flash(query, key, value, scale)
