"""How an operation on the logical tensor maps onto its inner tensors.

Codes and scales have the axes of what they stand for, with bytes or scales in place of channels,
so an operation on any other axis maps straight onto them. Shift and equalizer have size 1 where
vectors share them, and always along the rows. Two operations are only noted down: the swap of the
last two axes (`_transposed`) and the repetition of heads (`_n_rep`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from quantforge.errors import UnsupportedError
from quantforge.ops.checks import has_values
from quantforge.tensor import QuantTensor

aten = torch.ops.aten
Tensor = torch.Tensor
STATISTICS = ("_shift", "_equalizer")


def axis_of(ndim: int, dim: int) -> int:
    """Return a possibly negative dim as an axis, or raise as torch does."""
    if not -ndim <= dim < ndim:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-ndim}, {ndim - 1}], "
            f"but got {dim})"
        )
    return dim % ndim


def inner_axis(x: QuantTensor, dim: int, op: str) -> int:
    """Return the axis of the inner tensors for a logical axis other than the channels."""
    axis = swapped(x, axis_of(x.ndim, dim))
    if axis == x.ndim - 1:
        raise UnsupportedError(
            f"{op} along the channels of a QuantTensor is not defined: a vector is coded as a "
            "whole; dequantize() first"
        )
    return axis


def swapped(x: QuantTensor, axis: int) -> int:
    """Return the inner axis of any logical axis, the channels included."""
    return 2 * x.ndim - 3 - axis if x._transposed and axis >= x.ndim - 2 else axis


def lead_axis(x: QuantTensor, dim: int, op: str) -> tuple[QuantTensor, int]:
    """Return x and the inner axis, with heads repeated for real if the axis is theirs."""
    axis = inner_axis(x, dim, op)
    return (plain(x) if axis == x.ndim - 3 else x), axis


def rebuild(
    x: QuantTensor, f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor], **changes: Any
) -> QuantTensor:
    """Apply f to codes and scales and g to shift and equalizer."""
    shift, equalizer = (None if t is None else g(t) for t in (x._shift, x._equalizer))
    if any(t is not None and t.ndim > 1 and t.shape[-2] != 1 for t in (shift, equalizer)):
        raise mixed_rows()
    return QuantTensor._make(f(x._packed), f(x._scales), shift, equalizer, x._meta(**changes))


def along(x: QuantTensor, axis: int, f: Callable[[Tensor], Tensor], **changes: Any) -> QuantTensor:
    """Apply f, which rearranges one axis of the inner tensors; shared statistics stay."""
    return rebuild(x, f, lambda t: t if t.shape[axis] == 1 else f(t), **changes)


def plain(x: QuantTensor) -> QuantTensor:
    """Carry out a noted repetition of heads on the codes."""
    if x._n_rep == 1:
        return x
    heads = x.ndim - 3
    return along(x, heads, lambda t: t.repeat_interleave(x._n_rep, dim=heads), n_rep=1)


def alias(x: QuantTensor) -> QuantTensor:
    """Return another tensor over the same memory."""
    return rebuild(x, aten.alias.default, _itself)


def flipped(x: QuantTensor) -> QuantTensor:
    """Return `x.mT`: a note, no data moves."""
    return rebuild(x, aten.alias.default, _itself, transposed=not x._transposed)


def _itself(statistic: Tensor) -> Tensor:
    return statistic


def inner_sizes(x: QuantTensor, sizes: Sequence[Any]) -> list[Any]:
    """Return per-axis numbers in the order of the inner tensors."""
    sizes = list(sizes)
    if x._transposed and len(sizes) > 1:
        sizes[-2], sizes[-1] = sizes[-1], sizes[-2]
    return sizes


def check_channels(x: QuantTensor, size: int, op: str) -> None:
    """Raise unless an operation leaves the channels at their number."""
    if size not in (-1, x._dim):
        raise UnsupportedError(
            f"{op} must keep the {x._dim} channels of a QuantTensor on an axis of their own; got "
            f"{size}; dequantize() first"
        )


def prepended(t: Tensor, ndim: int) -> Tensor:
    """Return t with leading axes of size one up to ndim."""
    return t.reshape((1,) * (ndim - t.ndim) + t.shape)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two statistics are equal. While tracing only the same memory is."""
    if a is None or b is None:
        return a is b
    if a is b or (
        torch._C._is_alias_of(a, b)  # type: ignore[attr-defined]
        and _place(a) == _place(b)
    ):
        return True
    ndim = max(a.ndim, b.ndim)
    return has_values(a) and torch.equal(prepended(a, ndim), prepended(b.to(a.device), ndim))


def _place(t: Tensor) -> tuple:
    return t.storage_offset(), t.shape, t.stride()


def same_statistics(a: QuantTensor, b: QuantTensor) -> bool:
    """Return whether two tensors have equal shift and equalizer."""
    return all(same(getattr(a, name), getattr(b, name)) for name in STATISTICS)


def check_same_code(tensors: Sequence[Any], op: str) -> None:
    """Raise unless all are QuantTensors of one spec and orientation."""
    kinds = {
        f"QuantTensor({t._spec_key}{', transposed' * t._transposed})"
        if isinstance(t, QuantTensor)
        else type(t).__name__
        for t in tensors
    }
    if len(kinds) != 1:
        raise UnsupportedError(
            f"{op} needs QuantTensors of one spec; got {' and '.join(sorted(kinds))}; quantize or "
            "dequantize() the others"
        )


def mixed_rows() -> UnsupportedError:
    """Return the error for a view whose rows would not share a shift or equalizer."""
    return UnsupportedError(
        "this view would put vectors of different shift or equalizer into one row axis; "
        "dequantize() first, or index with a slice of length one"
    )


def different_statistics(op: str) -> UnsupportedError:
    """Return the error for joining vectors of different shift or equalizer."""
    return UnsupportedError(
        f"{op} needs QuantTensors of one shift and equalizer; dequantize() them, or quantize them "
        "together"
    )
