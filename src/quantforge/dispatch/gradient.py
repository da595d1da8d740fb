"""What becomes of a dense operand: autocast, and the refusal of gradients.

A gradient would have to pass through packed codes. The operators have no backward formula, so
without more ado autograd would drop it; here it raises, in eager mode and in compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from quantforge.errors import UnsupportedError
from quantforge.ops._library import register


def _refuse(grad: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    raise UnsupportedError(
        "quantized tensors have no backward: training through them is not supported; decode "
        "with .dequantize() first, or run under torch.no_grad()"
    )


# An operator, because a compiled backward is traced long before anybody runs it.
refuse_backward = register(
    "refuse_backward(Tensor grad, SymInt[] size) -> Tensor",
    fake=lambda grad, size: grad.new_empty(size),
    eager=_refuse,
)


class _NoBackward(torch.autograd.Function):
    """Identity on a result whose gradient would have to pass through packed codes."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        ctx.sizes = [t.shape for t in operands]
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return None, *[refuse_backward(grads[0], size) for size in ctx.sizes]


def no_backward(result: torch.Tensor, *operands: torch.Tensor | None) -> torch.Tensor:
    """Return result; a backward pass to one of the operands it was made of raises."""
    dense = [t for t in operands if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in dense):
        return _NoBackward.apply(result, *dense)
    return result


def forward_only(f: Callable[[torch.Tensor], torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    """Return f(dense); a backward pass through it raises instead of losing the gradient."""
    return no_backward(f(dense.detach()), dense)


def autocast(dense: torch.Tensor) -> torch.Tensor:
    """Cast an operand as autocast would: torch functions are taken before it acts."""
    device = dense.device.type
    if not torch.is_autocast_enabled(device) or dense.dtype == torch.float64:
        return dense
    return dense.to(torch.get_autocast_dtype(device))
