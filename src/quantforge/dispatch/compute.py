"""Products with packed codes: matmul and linear.

Taken as torch functions, because what reaches `__torch_dispatch__` depends on the grad mode. The
aten forms are registered beside them for callers that bypass torch functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quantforge.dispatch.gradient import autocast, forward_only
from quantforge.dispatch.layout import aten, flipped, plain
from quantforge.dispatch.register import on
from quantforge.dispatch.views import _unsqueeze
from quantforge.errors import InputError, UnsupportedError
from quantforge.ops.combine import op as combine_op
from quantforge.ops.scores import op as scores_op
from quantforge.tensor import QuantTensor


@on(torch.matmul, torch.Tensor.matmul, aten.matmul.default)
@on(torch.mm, torch.Tensor.mm, aten.mm.default, torch.bmm, torch.Tensor.bmm, aten.bmm.default)
@on(torch.mv, torch.Tensor.mv, aten.mv.default)
def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply `a @ b` where one of the two is packed, in the dtype of the dense one."""
    _check_operands(a, b)
    if isinstance(b, QuantTensor):
        if b.ndim == 1:
            return _product(a, flipped(_unsqueeze(b, 0))).squeeze(-1)
        return _product(a, b)
    assert isinstance(a, QuantTensor), "torch calls a handler for the sake of a QuantTensor"
    if a.ndim == 1:
        return matmul(_unsqueeze(a, 0), b).select(-1 if b.ndim == 1 else -2, 0)
    if b.ndim == 1:
        return _product(b, flipped(a))
    return _product(b.mT, flipped(a)).mT  # a b = (b^T a^T)^T


def _check_operands(a: torch.Tensor, b: torch.Tensor) -> None:
    if isinstance(a, QuantTensor) and isinstance(b, QuantTensor):
        raise UnsupportedError(
            "matmul of two QuantTensors is not defined; dequantize() one of them"
        )
    if a.shape[-1] != b.shape[max(b.ndim - 2, 0)]:
        raise InputError(
            f"matmul needs inner sizes that agree; got {tuple(a.shape)} @ {tuple(b.shape)}"
        )


def _product(dense: torch.Tensor, x: QuantTensor) -> torch.Tensor:
    """Return `dense @ x`: scores if x is transposed, (..., dim, n), else sums of its rows."""
    rows = autocast(dense.unsqueeze(0) if dense.ndim == 1 else dense)
    out = forward_only(lambda q: _product_of_rows(q, x), rows)
    return out.squeeze(-2) if dense.ndim == 1 else out


def _product_of_rows(rows: torch.Tensor, x: QuantTensor) -> torch.Tensor:
    op = scores_op.scores if x._transposed else combine_op.combine
    if x._n_rep > 1 and rows.shape[:-2] != x.shape[:-2]:
        x = plain(x)
    parts = (x._packed, x._scales, x._shift, x._equalizer, x._spec_key)
    sizes = (*rows.shape[:-1], x.shape[-1])
    if x._n_rep > 1:  # the queries of all heads that share a key head are rows of one product
        grouped = (*x._packed.shape[:-2], x._n_rep * rows.shape[-2], rows.shape[-1])
        return op(rows.reshape(grouped), *parts).view(sizes)
    if x.ndim == 2 and rows.ndim > 2:
        return op(rows.flatten(0, -2), *parts).view(sizes)
    return op(rows, *parts)


@on(torch.Tensor.__rmatmul__)
def _rmatmul(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return matmul(a, b)


@on(F.linear, aten.linear.default)
def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `input @ weight^T + bias`."""
    if weight.ndim > 1:
        weight = flipped(weight) if isinstance(weight, QuantTensor) else weight.mT
    out = matmul(input, weight)
    return out if bias is None else out + bias.to(out.dtype)


@on(torch.addmm, torch.Tensor.addmm, aten.addmm.default)
def _addmm(
    input: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """Return `beta * input + alpha * a @ b`: GPT-2's linear layer, and what `linear` becomes."""
    out = matmul(a, b)
    return beta * input.to(out.dtype) + (out if alpha == 1 else alpha * out)
