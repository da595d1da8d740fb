"""Operations on several packed tensors: cat, stack and equal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from quantforge.dispatch.layout import (
    Tensor,
    aten,
    axis_of,
    check_same_code,
    different_statistics,
    inner_axis,
    plain,
    same,
    same_statistics,
)
from quantforge.dispatch.register import on
from quantforge.dispatch.views import _unsqueeze
from quantforge.errors import UnsupportedError
from quantforge.tensor import QuantTensor


@on(aten.cat.default)
def _cat(tensors: Sequence[QuantTensor], dim: int = 0) -> QuantTensor:
    check_same_code(tensors, "cat")
    axis = inner_axis(tensors[0], dim, "cat")
    tensors = [plain(t) for t in tensors]
    return QuantTensor._make(
        torch.cat([t._packed for t in tensors], axis),
        torch.cat([t._scales for t in tensors], axis),
        _cat_statistic(tensors, "_shift", axis),
        _cat_statistic(tensors, "_equalizer", axis),
        tensors[0]._meta(dtype=reduce(torch.promote_types, [t.dtype for t in tensors])),
    )


def _cat_statistic(tensors: Sequence[QuantTensor], name: str, axis: int) -> Tensor | None:
    """Join the shifts or equalizers; along the rows there must be one for all."""
    parts = [getattr(t, name) for t in tensors]
    first = parts[0]
    if all(same(part, first) for part in parts) and (first is None or first.shape[axis] == 1):
        return first
    if any(part is None for part in parts) or axis == tensors[0].ndim - 2:
        raise different_statistics("cat")
    sizes = [max(part.shape[i] for part in parts) for i in range(first.ndim)]
    full = []
    for part, t in zip(parts, tensors, strict=True):
        sizes[axis] = t._packed.shape[axis]
        full.append(part.expand(sizes))
    return torch.cat(full, axis)


@on(aten.stack.default)
def _stack(tensors: Sequence[QuantTensor], dim: int = 0) -> QuantTensor:
    check_same_code(tensors, "stack")
    dim = axis_of(tensors[0].ndim + 1, dim)
    return _cat([_unsqueeze(t, dim) for t in tensors], dim)


@on(aten.equal.default)
def _equal(a: QuantTensor, b: QuantTensor) -> bool:
    """Return whether both hold the same codes (not: stand for the same numbers)."""
    if not (isinstance(a, QuantTensor) and isinstance(b, QuantTensor)):
        raise UnsupportedError("equal of a QuantTensor and a dense tensor; dequantize() it first")
    a, b = plain(a), plain(b)
    kinds = [(t._spec_key, t._transposed, t.shape) for t in (a, b)]
    if kinds[0] != kinds[1]:
        return False
    codes = torch.equal(a._packed, b._packed) and torch.equal(a._scales, b._scales)
    return codes and same_statistics(a, b)
