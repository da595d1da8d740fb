"""What torch would do silently wrong, or crash on, if it were let."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch._higher_order_ops.flex_attention import flex_attention

from quantforge.dispatch.register import on
from quantforge.errors import UnsupportedError
from quantforge.tensor import QuantTensor


@on(torch.Tensor.share_memory_)
def _share_memory(x: QuantTensor) -> QuantTensor:
    """Share the codes: torch's own share_memory_ crashes the process on a wrapper subclass."""
    for inner in x._inner().values():
        inner.share_memory_()
    return x


@on(torch.Tensor.is_shared)
def _is_shared(x: QuantTensor) -> bool:
    return all(inner.is_shared() for inner in x._inner().values())


@on(torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _requires_grad(x: QuantTensor, requires_grad: bool = True) -> QuantTensor:
    if requires_grad:
        raise UnsupportedError(
            "a QuantTensor has no gradient: requires_grad must stay False; dequantize() it to train"
        )
    return x


@on(torch.Tensor.__setitem__)
def _setitem(x: torch.Tensor, key: Any, value: Any) -> None:
    """Refuse to write into repeated heads: they are selected as copies, so it would be lost."""
    if isinstance(x, QuantTensor) and x._n_rep > 1:
        raise UnsupportedError("__setitem__ into repeated heads; write before they are repeated")
    with torch._C.DisableTorchFunctionSubclass():
        x[key] = value


@on(flex_attention)
def _flex_attention(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedError(
        "flex_attention does not read packed codes; use scaled_dot_product_attention "
        '(attn_implementation="sdpa"), or dequantize() key and value'
    )


def _no_numbers(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedError(f"QuantTensor has no numbers for {name}; use .dequantize().{name}()")


for _name in ("item", "tolist", "numpy", "__array__", "__bool__"):
    on(getattr(torch.Tensor, _name))(partial(_no_numbers, _name))
