"""Views: slices, permutations and shapes of packed codes. Nothing here reads a code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import torch

from quantforge.dispatch.layout import (
    Tensor,
    alias,
    along,
    aten,
    axis_of,
    check_channels,
    inner_sizes,
    lead_axis,
    mixed_rows,
    plain,
    prepended,
    rebuild,
    swapped,
)
from quantforge.dispatch.register import on
from quantforge.errors import InputError, UnsupportedError
from quantforge.tensor import QuantTensor

# ---- one axis at a time --------------------------------------------------------------------


@on(aten.slice.Tensor)
def slice_(
    x: QuantTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> QuantTensor:
    """Slice one axis; a full slice of the channels is allowed."""
    size = x.shape[dim]
    from_first = start is None or start == 0 or start <= -size
    if from_first and (end is None or end >= size) and step == 1:
        return alias(x)
    x, axis = lead_axis(x, dim, "slicing")
    return along(x, axis, lambda t: aten.slice.Tensor(t, axis, start, end, step))


@on(aten.index_select.default)
def _index_select(x: QuantTensor, dim: int, index: Tensor) -> QuantTensor:
    x, axis = lead_axis(x, dim, "index_select")
    return along(x, axis, lambda t: t.index_select(axis, index))


@on(aten.select.int)
def _select(x: QuantTensor, dim: int, index: int) -> QuantTensor:
    x, axis = lead_axis(x, dim, "select")
    statistic = lambda t: t.select(axis, index if t.shape[axis] > 1 else 0)  # noqa: E731
    return _without(x, axis, lambda t: t.select(axis, index), statistic)


def _without(
    x: QuantTensor, axis: int, f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor]
) -> QuantTensor:
    """Rebuild x by f and g, which drop an axis. Without rows there is nothing to transpose."""
    if axis == x.ndim - 2:
        return rebuild(plain(x), f, g, transposed=False)
    return rebuild(x, f, g)


@on(aten.unbind.int)
def _unbind(x: QuantTensor, dim: int = 0) -> tuple[QuantTensor, ...]:
    x, _ = lead_axis(x, dim, "unbind")
    return tuple(_select(x, dim, i) for i in range(x.shape[dim]))


@on(aten.split_with_sizes.default)
def _split_with_sizes(x: QuantTensor, sizes: Sequence[int], dim: int = 0) -> list[QuantTensor]:
    if sum(sizes) != x.shape[dim]:
        raise InputError(f"split sizes {list(sizes)} must add up to {x.shape[dim]}")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice_(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@on(aten.split.Tensor)
def _split(x: QuantTensor, size: int, dim: int = 0) -> list[QuantTensor]:
    starts = range(0, max(x.shape[dim], 1), max(size, 1))
    return [slice_(x, dim, start, start + size) for start in starts]


@on(aten.flip.default)
def _flip(x: QuantTensor, dims: Sequence[int]) -> QuantTensor:
    for dim in dims:
        x, axis = lead_axis(x, dim, "flip")
        x = along(x, axis, lambda t, axis=axis: t.flip(axis))  # type: ignore[misc]
    return x


@on(aten.repeat_interleave.self_int, torch.Tensor.repeat_interleave, torch.repeat_interleave)
def _repeat_interleave(
    x: QuantTensor, repeats: int | Tensor, dim: int | None = None, **kwargs: Any
) -> QuantTensor:
    if dim is None:
        raise UnsupportedError("repeat_interleave of a QuantTensor without dim= would flatten it")
    x, axis = lead_axis(x, dim, "repeat_interleave")
    return along(x, axis, lambda t: t.repeat_interleave(repeats, dim=axis, **kwargs))


@on(aten.index.Tensor)
def _index(x: QuantTensor, indices: Sequence[Tensor | None]) -> QuantTensor:
    indices = index_tensors(indices)
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if len(used) == 1 and indices[used[0]].ndim == 1:  # type: ignore[union-attr]
        x, axis = lead_axis(x, used[0], "indexing")
        full = [None] * axis + [indices[used[0]]]
        return along(x, axis, lambda t: aten.index.Tensor(t, full))
    x = indexable(x, used)
    packed = aten.index.Tensor(x._packed, indices)

    def statistic(t: Tensor) -> Tensor:
        if t.numel() == x._dim:
            return prepended(t.flatten(), packed.ndim)
        sizes = [x._packed.shape[i] if i in used else -1 for i in range(x.ndim)]
        return aten.index.Tensor(t.expand(sizes), indices)

    return rebuild(x, lambda t: aten.index.Tensor(t, indices), statistic)


def index_tensors(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return indices with masks turned into the positions that they select."""
    positions: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        positions += index.nonzero().unbind(1) if is_mask else [index]  # type: ignore[union-attr]
    return positions


def indexable(x: QuantTensor, used: Sequence[int]) -> QuantTensor:
    """Return x with its inner tensors ready to be indexed along several axes."""
    if x._transposed:
        raise UnsupportedError("index a transposed QuantTensor along one axis, or before .mT")
    for dim in used:
        x, _ = lead_axis(x, dim, "indexing")
    return plain(x)


# ---- shapes ----------------------------------------------------------------------------------


@on(aten.transpose.int)
def _transpose(x: QuantTensor, dim0: int, dim1: int) -> QuantTensor:
    dims = list(range(x.ndim))
    a, b = axis_of(x.ndim, dim0), axis_of(x.ndim, dim1)
    dims[a], dims[b] = b, a
    return _permute(x, dims)


@on(aten.t.default)
def _t(x: QuantTensor) -> QuantTensor:
    return _permute(x, range(x.ndim)[::-1])


@on(aten.permute.default)
def _permute(x: QuantTensor, dims: Sequence[int]) -> QuantTensor:
    dims = [swapped(x, axis_of(x.ndim, dim)) for dim in dims]
    channels = dims.index(x.ndim - 1)
    if channels < x.ndim - 2:
        raise UnsupportedError(
            "permute must leave the channels of a QuantTensor on one of the last two axes; "
            "dequantize() first"
        )
    transposed = channels == x.ndim - 2
    if transposed:
        dims[-2], dims[-1] = dims[-1], dims[-2]
    if x.ndim > 2 and dims[-3] != x.ndim - 3:
        x = plain(x)
    return rebuild(x, lambda t: t.permute(dims), lambda t: t.permute(dims), transposed=transposed)


@on(aten.unsqueeze.default)
def _unsqueeze(x: QuantTensor, dim: int) -> QuantTensor:
    axis = axis_of(x.ndim + 1, dim)
    if axis == x.ndim or (axis == x.ndim - 1 and x._transposed):
        raise UnsupportedError(
            "unsqueeze must leave the channels of a QuantTensor on one of the last two axes"
        )
    x = plain(x) if axis == x.ndim - 2 else x
    return x._map(lambda t: t.unsqueeze(axis))


@on(aten.squeeze.dim)
def _squeeze(x: QuantTensor, dim: int) -> QuantTensor:
    if x.shape[dim] != 1:
        return alias(x)
    x, axis = lead_axis(x, dim, "squeeze")
    return _without(x, axis, lambda t: t.squeeze(axis), lambda t: t.squeeze(axis))


@on(aten.squeeze.dims)
def _squeeze_dims(x: QuantTensor, dims: Sequence[int]) -> QuantTensor:
    for axis in sorted((axis_of(x.ndim, dim) for dim in dims), reverse=True):
        x = _squeeze(x, axis)
    return x


@on(aten.squeeze.default)
def _squeeze_all(x: QuantTensor) -> QuantTensor:
    return _squeeze_dims(x, [dim for dim in range(x.ndim) if x.shape[dim] == 1])


@on(aten.expand.default)
def expand(x: QuantTensor, sizes: Sequence[int], *, implicit: bool = False) -> QuantTensor:
    """Repeat axes of size one without copying."""
    sizes = inner_sizes(x, sizes)
    check_channels(x, sizes[-1], "expand")

    def codes(t: Tensor) -> Tensor:
        return t.expand(*sizes[:-1], t.shape[-1])

    return rebuild(plain(x), codes, lambda t: prepended(t, len(sizes)))


@on(aten.repeat.default)
def _repeat(x: QuantTensor, repeats: Sequence[int]) -> QuantTensor:
    repeats = inner_sizes(x, repeats)
    if repeats[-1] != 1:
        raise UnsupportedError("repeat of the channels of a QuantTensor; dequantize() first")

    def statistic(t: Tensor) -> Tensor:
        t = prepended(t, len(repeats))
        return t.repeat([r if size > 1 else 1 for r, size in zip(repeats, t.shape, strict=True)])

    return rebuild(plain(x), lambda t: t.repeat(*repeats), statistic)


@on(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
@on(torch.Tensor.reshape, torch.reshape)
def reshape(x: QuantTensor, *sizes: Any, shape: Any = None) -> QuantTensor:
    """Change the axes before the channels; codes that cannot be viewed so are copied."""
    return _reshape(x, torch.Tensor.reshape, sizes if shape is None else (shape,))


@on(torch.Tensor.view)
def _view(x: QuantTensor, *sizes: Any, size: Any = None, dtype: Any = None) -> QuantTensor:
    if dtype is not None or (sizes and isinstance(sizes[0], torch.dtype)):
        raise UnsupportedError("view of a QuantTensor as another dtype; use .to(dtype)")
    return _reshape(x, torch.Tensor.view, sizes if size is None else (size,))


def _reshape(x: QuantTensor, f: Callable[..., Tensor], args: Sequence[Any]) -> QuantTensor:
    sizes = _sizes(x, args)
    if sizes == list(x.shape):
        return alias(x)
    if (repeated := _lazily_repeated(x, sizes)) is not None:
        return repeated
    sizes = inner_sizes(x, sizes)
    check_channels(x, sizes[-1] if sizes else 1, "reshape")
    if x._transposed and sizes[-2] != x.shape[-1]:
        raise UnsupportedError("reshape of a transposed QuantTensor must keep its last two axes")
    x, lead = plain(x), sizes[:-1]
    return rebuild(x, lambda t: f(t, (*lead, t.shape[-1])), lambda t: _regrouped(x, t, lead))


def _sizes(x: QuantTensor, args: Sequence[Any]) -> list[int]:
    """Return the sizes given to reshape or view, -1 worked out."""
    sizes = list(args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args)
    if -1 in sizes:
        known = prod(size for size in sizes if size != -1)
        if known == 0 or x.numel() % known or sizes.count(-1) > 1:
            raise InputError(f"cannot reshape a tensor of shape {tuple(x.shape)} to {sizes}")
        sizes[sizes.index(-1)] = x.numel() // known
    return sizes


def _regrouped(x: QuantTensor, t: Tensor, lead: Sequence[int]) -> Tensor:
    """Return a statistic of x for vectors that are regrouped to the axes `lead`.

    It can follow as far as its own axes are regrouped among themselves.
    """
    least = max((axis + 1 for axis in range(x.ndim - 1) if t.shape[axis] > 1), default=0)
    shape = x._packed.shape
    for own, axes in product(range(least, x.ndim), range(len(lead) + 1)):
        if prod(shape[:own]) == prod(lead[:axes]):
            full = t.expand(*shape[:own], *t.shape[own:])
            return full.reshape(*lead[:axes], *(1,) * (len(lead) - axes), x._dim)
    raise mixed_rows()


def _lazily_repeated(x: QuantTensor, sizes: Sequence[int]) -> QuantTensor | None:
    """Recognize the end of transformers' `repeat_kv`: (B, H, n expanded, S, D) -> (B, H n, S, D).

    The repetition stays a number: attention reads each head's codes once for all its queries.
    """
    if x.ndim != 5 or len(sizes) != 4 or x._transposed or x._packed.stride(2) != 0:
        return None
    b, h, n, s, d = x.shape
    if list(sizes) != [b, h * n, s, d]:
        return None
    return rebuild(x, lambda t: t.select(2, 0), lambda t: t.select(2, 0), n_rep=n)
