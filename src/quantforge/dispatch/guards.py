"""Operations that must be refused loudly, because torch would do something silently wrong."""

from __future__ import annotations

import torch

from quantforge.dispatch.compute import on
from quantforge.errors import UnsupportedError
from quantforge.tensor import QuantTensor


@on(torch.Tensor.share_memory_)
def _share_memory(self: QuantTensor) -> QuantTensor:
    # torch's own share_memory_ crashes the process on a wrapper subclass
    for inner in self._inner().values():
        inner.share_memory_()
    return self


@on(torch.Tensor.is_shared)
def _is_shared(self: QuantTensor) -> bool:
    return all(inner.is_shared() for inner in self._inner().values())


@on(torch.Tensor.requires_grad_)
def _requires_grad(self: QuantTensor, requires_grad: bool = True) -> QuantTensor:
    if requires_grad:
        raise UnsupportedError("a QuantTensor cannot require gradients; dequantize() it to train")
    return self
