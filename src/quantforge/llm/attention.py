"""`attn_implementation="quantforge"`: transformers' attention, straight to the operators on codes.

A `QuantForgeCache` works with "sdpa" and "eager" too, whose calls it intercepts. This one spares
the interception, and does what "sdpa" cannot and "eager" does by writing out all logits: soft-caps
(Gemma 2), attention sinks (gpt-oss), sliding windows.

    no cache, a first prompt      torch SDPA or flash; with caps or masks a few query rows at a time
    pages, few queries            one fused operator
    else                          packed and dense segments, merged by their log-sum-exp

A sink is a segment with the output 0 and the log-sum-exp `s_aux` (arXiv 2309.17453, section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quantforge.dispatch.gradient import forward_only
from quantforge.errors import UnsupportedError
from quantforge.llm.observe import WatchedTensor
from quantforge.llm.segments import SegmentedTensor, attend_pages, attend_rows, is_fused, show
from quantforge.llm.static_view import StaticTensor, attend_static
from quantforge.ops.merge import (
    MAX_LOGITS,
    Partial,
    dense_attention,
    fits_flash,
    merge_partials,
)

NAME = "quantforge"


def quantforge_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks; keys and values are dense or come from a `QuantForgeCache`.

    Args:
        module: the attention layer.
        query: (B, Hq, q, dim).
        key: (B, Hkv, n, dim).
        value: (B, Hkv, n, value dim).
        attention_mask: bool or additive, broadcasting to (B, Hq, q, n), or None.
        dropout: of the weights, in training without a cache.
        scaling: of the logits; 1 / sqrt(dim) if None.
        is_causal: whether a call without a mask is causal; what the module says if None.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        s_aux: (Hq,) logits of the sinks.
        sliding_window: tokens that a query sees; a mask, where there is one, says so too.
        position_bias: added to the logits, as T5 does.
        **kwargs: what "sdpa" takes.

    Returns:
        output (B, q, Hq, value dim), and None for the weights.

    Raises:
        UnsupportedError: for dropout on packed keys, caps or sinks.
    """
    capped = softcap is not None or s_aux is not None
    packed = isinstance(key, SegmentedTensor | StaticTensor)
    if not packed and not capped:
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
    if dropout:
        raise UnsupportedError(
            "dropout belongs to training, which packed keys, soft-caps and sinks do not support "
            'here; use model.eval() or attn_implementation="eager"'
        )
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and length > 1 and attention_mask is None
    if causal and not packed and key.shape[2] > length:
        key, value = key[:, :, :length], value[:, :, :length]  # a static cache, filled in part
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    prompt = causal and not packed and key.shape[2] == length and position_bias is None
    plain = not softcap and length <= (sliding_window or length)
    flash = prompt and plain and fits_flash(query, key, value)
    if flash and not _needs_gradient(query, key, value):
        parts = [_causal_flash(query, key, value, scale)]
        show(query, key, scale)
        return _joined(parts, s_aux, query.dtype), None
    mask = attention_mask
    if mask is None and not isinstance(key, StaticTensor):  # which knows its lengths itself
        mask = _positions(query, key.shape[2], causal, sliding_window)
    if position_bias is not None:
        mask = _with_bias(mask, position_bias)

    def run(q: torch.Tensor) -> torch.Tensor:
        parts = _partials(q, key, value, mask, scale, softcap or 0.0, sliding_window or 0)
        return _joined(parts, s_aux, q.dtype)

    out = forward_only(run, query) if packed else run(query)
    show(query, key, scale, attention_mask)
    return out, None


def _joined(parts: list[Partial], sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Merge partial results and sinks (Hq,) into (B, q, Hq, value dim)."""
    if sinks is not None:
        lse = sinks.float().view(1, -1, 1).expand_as(parts[0][1])
        parts = [*parts, (torch.zeros((), device=lse.device), lse)]
    out = merge_partials(parts) if len(parts) > 1 else parts[0][0]
    return out.to(dtype).transpose(1, 2).contiguous()


def _causal_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> Partial:
    """Attend from a prompt to itself by torch's flash kernel, which tells the log-sum-exp."""
    repeats = query.shape[1] // key.shape[1]
    dense = (x.as_subclass(torch.Tensor).repeat_interleave(repeats, 1) for x in (key, value))
    op = torch.ops.aten._scaled_dot_product_flash_attention.default
    result = op(query.contiguous(), *dense, 0.0, True, scale=scale)
    return result[0], result[1]


def _positions(
    query: torch.Tensor, n: int, causal: bool, window: int | None
) -> torch.Tensor | None:
    """Return the mask (1, 1, q, n) where the last query is the last token, None if it is all."""
    narrow = window is not None and n > window
    if not causal and not narrow:
        return None
    place = torch.arange(n, device=query.device)
    own = place[n - query.shape[2] :, None]
    seen = place <= own if causal else torch.ones_like(place <= own)
    if window is not None:
        seen = seen & (place > own - window)
    return seen[None, None]


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return mask + bias


def _partials(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> list[Partial]:
    if isinstance(key, SegmentedTensor) and isinstance(value, SegmentedTensor):
        if is_fused(query, key, value, mask):
            # several queries may see both ways, as the tokens of an image do
            window = window if query.shape[2] == 1 else 0
            return attend_pages(query, key, value, mask, scale, softcap, window)
        if not softcap:
            return attend_rows(query, key, value, mask, scale)
        return [_by_rows(query, key.unseen(), value, mask, scale, softcap)]
    if isinstance(key, StaticTensor) and isinstance(value, StaticTensor):
        return attend_static(query, key, value, mask, scale, softcap)
    if isinstance(key, WatchedTensor):
        key = key.as_subclass(torch.Tensor)
    if mask is None and not softcap and not _needs_gradient(query, key, value):
        return [dense_attention(query, key, value, mask, scale)]
    # in float32: a matmul of half numbers would round the logits
    return [_by_rows(query.float(), key.float(), value.float(), mask, scale, softcap)]


def _needs_gradient(*tensors: torch.Tensor) -> bool:
    """Return whether a log-sum-exp is differentiated, which that of a flash kernel is not."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _by_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> Partial:
    """Attend with logits written out in float32, a few query rows at a time."""
    batch, heads, length, _ = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    step = max(1, MAX_LOGITS // max(1, batch * heads * n))
    outs, lses = [], []
    for start in range(0, length, step):
        rows = slice(start, start + step)
        grouped = query[:, :, rows].reshape(batch, kv_heads, -1, query.shape[-1])
        logits = torch.matmul(grouped, key.transpose(2, 3)).float() * scale
        logits = logits.view(batch, heads, -1, n)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            tile = mask[:, :, rows] if mask.shape[2] > 1 else mask
            fits = tile.dtype == torch.bool
            logits = logits.masked_fill(~tile, -torch.inf) if fits else logits + tile
        lse = logits.logsumexp(-1)
        finite = torch.where(lse == -torch.inf, 0.0, lse)
        weights = (logits - finite[..., None]).exp().to(query.dtype)
        out = torch.matmul(weights.view(batch, kv_heads, -1, n), value)
        outs.append(out.view(batch, heads, -1, value.shape[-1]))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


AttentionInterface.register(NAME, quantforge_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
