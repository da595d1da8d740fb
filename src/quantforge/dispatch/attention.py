"""Scaled dot product attention over packed keys and values.

SDPA reaches `__torch_dispatch__` whole only under inference mode; elsewhere it is decomposed or
has become the operator of a backend. So it is taken as a torch function; the backends' operators
are registered for callers that bypass torch functions.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F

from quantforge.dispatch.gradient import autocast, no_backward
from quantforge.dispatch.layout import aten, plain
from quantforge.dispatch.register import on
from quantforge.dispatch.views import _unsqueeze, expand
from quantforge.errors import InputError, UnsupportedError
from quantforge.ops.attention import op as attention_op
from quantforge.tensor import QuantTensor


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
    """Attend to packed keys and values, in the query's dtype."""
    if not enable_gqa and query.ndim > 3 and query.shape[-3] != key.shape[-3]:
        raise InputError(
            f"query has {query.shape[-3]} heads and key {key.shape[-3]}; repeat the key heads or "
            "use enable_gqa=True"
        )
    return attention_with_lse(query, key, value, attn_mask, dropout_p, is_causal, scale)[0]


def attention_with_lse(
    query: torch.Tensor,
    key: QuantTensor,
    value: QuantTensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention and its log-sum-exp, with the argument order of torch SDPA."""
    _check_operands(query, key, value, dropout_p)
    dense, missing = query, 4 - query.ndim  # (B, q, dim) and (q, dim) are attention with one head
    query = autocast(query.detach())
    for _ in range(missing):
        query, key, value = query.unsqueeze(0), _unsqueeze(key, 0), _unsqueeze(value, 0)
    query, key, value = _batched(query, key, value)
    out, lse = attention_op.attention(
        query,
        *(key._packed, key._scales, key._shift, key._equalizer),
        *(value._packed, value._scales, value._shift, value._equalizer),
        _full_mask(attn_mask, query, key),
        is_causal,
        1 / sqrt(key._dim) if scale is None else scale,
        key._spec_key,
        value._spec_key,
    )
    for _ in range(missing):
        out, lse = out[0], lse[0]
    return no_backward(out.to(query.dtype), dense, attn_mask), lse


def _check_operands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float
) -> None:
    if isinstance(query, QuantTensor) or not (
        isinstance(key, QuantTensor) and isinstance(value, QuantTensor)
    ):
        raise UnsupportedError(
            "scaled_dot_product_attention needs a dense query and QuantTensors for key and value; "
            f"got {type(query).__name__}, {type(key).__name__} and {type(value).__name__}; "
            "dequantize() or quantize the other"
        )
    if dropout_p:
        raise UnsupportedError(
            "scaled_dot_product_attention with dropout_p belongs to training, which packed codes "
            "do not support; set dropout_p=0.0 (model.eval())"
        )
    if key._transposed or value._transposed:
        raise UnsupportedError(
            "scaled_dot_product_attention reads the channels of key and value from the last axis; "
            "got a transposed QuantTensor; undo it with .mT"
        )
    fits = 2 <= query.ndim <= 4 and query.ndim == key.ndim == value.ndim
    fits = fits and query.shape[-1] == key.shape[-1] and key.shape[:-1] == value.shape[:-1]
    if not fits or (query.ndim == 4 and query.shape[1] % max(key.shape[1], 1)):
        raise InputError(
            "scaled_dot_product_attention needs query (B, Hq, q, dim), key (B, Hkv, n, dim) and "
            "value (B, Hkv, n, Dv) with Hq a multiple of Hkv, or all without heads or batch; got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )


def _batched(
    query: torch.Tensor, key: QuantTensor, value: QuantTensor
) -> tuple[torch.Tensor, QuantTensor, QuantTensor]:
    """Return the operands with one batch size, and heads repeated in both or in neither."""
    if key._n_rep != value._n_rep:
        key, value = plain(key), plain(value)
    batch = key.shape[0]
    if query.shape[0] == batch:
        return query, key, value
    if query.shape[0] == 1:
        return query.expand(batch, -1, -1, -1), key, value
    if batch != 1:
        raise InputError(f"batch sizes of query and key must agree; got {query.shape[0]}, {batch}")
    sizes = (query.shape[0], -1, -1, -1)
    return query, expand(key, sizes), expand(value, sizes)


def _full_mask(
    mask: torch.Tensor | None, query: torch.Tensor, key: QuantTensor
) -> torch.Tensor | None:
    """Return the mask with all of its last axis, which the operator slices."""
    if mask is None:
        return None
    target = torch.Size((*query.shape[:-1], key.shape[-2]))
    try:
        fits = torch.broadcast_shapes(mask.shape, target) == target
    except RuntimeError:
        fits = False
    if not fits or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise InputError(
            f"attn_mask must be bool or float and broadcast to {tuple(target)}; got {mask.dtype} "
            f"of shape {tuple(mask.shape)}"
        )
    return mask.detach().expand(*mask.shape[:-1], target[-1])


# ---- the operators of torch's backends, each with its own results --------------------------------


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
    return out, lse, _no_philox(), _no_philox()


@on(aten._scaled_dot_product_flash_attention.default)
def _flash(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple:  # fmt: skip
    out, lse = attention_with_lse(query, key, value, None, dropout_p, is_causal, scale)
    lengths = (query.shape[-2], key.shape[-2])
    return out, lse, None, None, *lengths, _no_philox(), _no_philox(), query.new_empty(0)


@on(aten._scaled_dot_product_cudnn_attention.default)
def _cudnn(
    query: Any, key: Any, value: Any, attn_bias: Any, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False,
    *, scale: float | None = None,
) -> tuple:  # fmt: skip
    out, lse = attention_with_lse(query, key, value, attn_bias, dropout_p, is_causal, scale)
    lengths = (query.shape[-2], key.shape[-2])
    return out, lse, None, None, *lengths, _no_philox(), _no_philox(), query.new_empty(0)


def _no_philox() -> torch.Tensor:
    """Return a state of the generator of dropout masks: there is no dropout."""
    return torch.zeros((), dtype=torch.int64)
