"""Arithmetic on packed codes: linear, matmul and attention.

Taken as torch functions, because what reaches `__torch_dispatch__` depends on the grad mode: SDPA
arrives there whole only under inference mode. The aten forms are registered beside them for
callers that bypass torch functions.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F

from quantforge.errors import InputError, UnsupportedError
from quantforge.ops.attention import op as attention_op
from quantforge.ops.combine import op as combine_op
from quantforge.ops.scores import op as scores_op
from quantforge.tensor import FUNCTIONS, OPERATORS, QuantTensor

aten = torch.ops.aten
Handler = Callable[..., Any]


def on(*keys: Any) -> Callable[[Handler], Handler]:
    """Register a handler under torch functions and aten overloads."""

    def register(handler: Handler) -> Handler:
        for key in keys:
            table = OPERATORS if isinstance(key, torch._ops.OpOverload) else FUNCTIONS
            table[key] = handler
        return handler

    return register


class _NoBackward(torch.autograd.Function):
    """Identity on a result whose gradient would have to pass through packed codes."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise UnsupportedError(
            "quantized tensors have no gradient: training through them is not supported; decode "
            "with .dequantize() first, or run under torch.no_grad()"
        )


def _forward_only(f: Callable[[torch.Tensor], torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    """Return f(dense); a backward pass through it raises instead of losing the gradient."""
    if not (torch.is_grad_enabled() and dense.requires_grad) or torch.compiler.is_compiling():
        return f(dense)
    with torch.no_grad():
        result = f(dense)
    return _NoBackward.apply(result, dense)


def _times_transposed(query: torch.Tensor, x: QuantTensor) -> torch.Tensor:
    """Return `query @ X^T` of an untransposed X: (..., q, dim) and (..., n, dim)."""
    packed, scales, shift, equalizer = x._packed, x._scales, x._shift, x._equalizer
    parts = (packed, scales, shift, equalizer, x._spec_key)
    if x._n_rep > 1:
        grouped = _group(query, packed)
        return scores_op.scores(grouped, *parts).reshape(*query.shape[:-1], packed.shape[-2])
    if packed.ndim == 2:
        flat = query.reshape(-1, query.shape[-1])
        return scores_op.scores(flat, *parts).view(*query.shape[:-1], packed.shape[-2])
    return scores_op.scores(query, *parts)


def _times(weights: torch.Tensor, x: QuantTensor) -> torch.Tensor:
    """Return `weights @ X` of an untransposed X: (..., q, n) and (..., n, dim)."""
    packed, scales, shift, equalizer = x._packed, x._scales, x._shift, x._equalizer
    parts = (packed, scales, shift, equalizer, x._spec_key)
    if x._n_rep > 1:
        grouped = _group(weights, packed)
        return combine_op.combine(grouped, *parts).reshape(*weights.shape[:-1], x._dim)
    if packed.ndim == 2:
        flat = weights.reshape(-1, weights.shape[-1])
        return combine_op.combine(flat, *parts).view(*weights.shape[:-1], x._dim)
    return combine_op.combine(weights, *parts)


def _group(dense: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Fold the query heads of a key head into rows: (B, Hq, q, m) -> (B, Hkv, q_per_kv * q, m)."""
    return dense.reshape(dense.shape[0], packed.shape[-3], -1, dense.shape[-1])


@on(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, aten.matmul.default)
@on(torch.mm, torch.Tensor.mm, aten.mm.default, torch.bmm, torch.Tensor.bmm, aten.bmm.default)
def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` where one of the two is packed."""
    if isinstance(a, QuantTensor) and isinstance(b, QuantTensor):
        raise UnsupportedError("matmul of two QuantTensors is not defined; dequantize() one of them")
    inner = (a.shape[-1], b.shape[max(b.ndim - 2, 0)])
    if inner[0] != inner[1]:
        raise InputError(f"matmul needs inner sizes that agree; got {a.shape} @ {b.shape}")
    if isinstance(b, QuantTensor):
        return _dense_times_packed(a, b)
    if b.ndim == 1:
        return _dense_times_packed(b, a.mT)
    return _dense_times_packed(b.mT, a.mT).mT


def _dense_times_packed(dense: torch.Tensor, x: QuantTensor) -> torch.Tensor:
    rows = dense.unsqueeze(0) if dense.ndim == 1 else dense
    product = _times_transposed if x._transposed else _times
    out = _forward_only(lambda d: product(d, x.mT if x._transposed else x), rows)
    return out.squeeze(-2) if dense.ndim == 1 else out


on(torch.Tensor.__rmatmul__)(lambda b, a: matmul(a, b))


@on(F.linear, aten.linear.default)
def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`input @ weight^T + bias`."""
    out = matmul(input, weight.mT)
    return out if bias is None else out + bias


@on(F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: QuantTensor,
    value: QuantTensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """SDPA with packed keys and values; grouped query heads need no repetition."""
    out, _ = attention_with_lse(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return out


def attention_with_lse(
    query: torch.Tensor,
    key: QuantTensor,
    value: QuantTensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp, with the argument order of torch SDPA."""
    _check_attention(query, key, value, dropout_p)
    key, value = (t.mT if t._transposed else t for t in (key, value))
    missing = 4 - query.ndim  # (B, q, dim) and (q, dim) are attention with one head
    if missing:
        query, key, value = (t[(None,) * missing] for t in (query, key, value))

    def run(q: torch.Tensor) -> torch.Tensor:
        nonlocal lse
        out, lse = attention_op.attention(
            q,
            *(key._packed, key._scales, key._shift, key._equalizer),
            *(value._packed, value._scales, value._shift, value._equalizer),
            attn_mask if attn_mask is None or not missing else attn_mask[(None,) * missing],
            is_causal,
            1 / sqrt(key._dim) if scale is None else scale,
            key._spec_key,
            value._spec_key,
        )
        return out.to(q.dtype)

    lse = query
    out = _forward_only(run, query)
    for _ in range(missing):
        out, lse = out[0], lse[0]
    return out, lse


def _check_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float
) -> None:
    if isinstance(query, QuantTensor) or not (
        isinstance(key, QuantTensor) and isinstance(value, QuantTensor)
    ):
        raise UnsupportedError(
            "attention needs a dense query and key and value both QuantTensor; got "
            f"{type(query).__name__}, {type(key).__name__} and {type(value).__name__}; "
            "dequantize() or quantize the other"
        )
    if dropout_p:
        raise UnsupportedError("dropout belongs to training, which packed codes do not support")
    fits = query.ndim == key.ndim == value.ndim <= 4 and query.shape[-1] == key.shape[-1]
    heads = key.shape[-3] if key.ndim > 2 else 1
    if not fits or key.shape[:-1] != value.shape[:-1] or (
        query.ndim == 4 and query.shape[-3] % heads
    ):
        raise InputError(
            "attention needs query (B, Hq, q, dim), key (B, Hkv, n, dim), value (B, Hkv, n, Dv) "
            f"with Hq a multiple of Hkv; got {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}"
        )


@on(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _flash_for_cpu(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False,
    *, attn_mask: Any = None, scale: float | None = None,
) -> tuple:  # fmt: skip
    return attention_with_lse(query, key, value, attn_mask, dropout_p, is_causal, scale)


@on(aten._scaled_dot_product_efficient_attention.default)
def _efficient(
    query: Any, key: Any, value: Any, attn_bias: Any, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
) -> tuple:  # fmt: skip
    out, lse = attention_with_lse(query, key, value, attn_bias, dropout_p, is_causal, scale)
    philox = torch.zeros((), dtype=torch.int64)
    return out, lse, philox, philox


@on(aten._scaled_dot_product_flash_attention.default)
def _flash(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple:  # fmt: skip
    out, lse = attention_with_lse(query, key, value, None, dropout_p, is_causal, scale)
    philox = torch.zeros((), dtype=torch.int64)
    lengths = (query.shape[-2], key.shape[-2])
    return out, lse, None, None, *lengths, philox, philox, query.new_empty(0)


@on(aten._scaled_dot_product_cudnn_attention.default)
def _cudnn(
    query: Any, key: Any, value: Any, attn_bias: Any, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False,
    *, scale: float | None = None,
) -> tuple:  # fmt: skip
    out, lse = attention_with_lse(query, key, value, attn_bias, dropout_p, is_causal, scale)
    philox = torch.zeros((), dtype=torch.int64)
    lengths = (query.shape[-2], key.shape[-2])
    return out, lse, None, None, *lengths, philox, philox, query.new_empty(0)
