"""Views, copies and moves of packed codes: nothing here reads a code.

Codes and scales have the axes of what they stand for, with bytes or scales in place of channels,
so an operation on any axis but the last maps straight onto them. Shift and equalizer have size 1
where all vectors share them, and size 1 along the rows always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from quantforge.dispatch.compute import on
from quantforge.errors import UnsupportedError
from quantforge.ops.checks import has_values
from quantforge.ops.quantize import op as quantize_op
from quantforge.tensor import QuantTensor

aten = torch.ops.aten
Tensor = torch.Tensor


# ---- how an operation maps onto the inner tensors ------------------------------------------


def _axis(x: QuantTensor, dim: int, op: str) -> int:
    """Return the axis of the inner tensors for a logical axis other than the channels."""
    dim = dim % x.ndim
    if x._transposed and dim >= x.ndim - 2:
        dim = 2 * x.ndim - 3 - dim
    if dim == x.ndim - 1:
        raise UnsupportedError(
            f"{op} along the channels of a QuantTensor is not defined: a vector is coded as a "
            "whole; dequantize() first"
        )
    return dim


def _rebuild(
    x: QuantTensor, f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor], **changes: Any
) -> QuantTensor:
    """Apply f to codes and scales and g to shift and equalizer."""
    statistics = [None if t is None else g(t) for t in (x._shift, x._equalizer)]
    if any(t is not None and t.ndim > 1 and t.shape[-2] != 1 for t in statistics):
        raise UnsupportedError(
            "this view would put vectors of different shift or equalizer into one row axis; "
            "dequantize() first, or index with a slice of length one"
        )
    return QuantTensor._make(f(x._packed), f(x._scales), *statistics, x._meta(**changes))


def _along(
    x: QuantTensor, dim: int, f: Callable[[Tensor], Tensor], **changes: Any
) -> QuantTensor:
    """Apply f, which rearranges one axis of the inner tensors; shared statistics stay."""
    return _rebuild(x, f, lambda t: t if t.shape[dim] == 1 else f(t), **changes)


def _plain(x: QuantTensor) -> QuantTensor:
    """Carry out a lazy repetition of heads on the codes."""
    if x._n_rep == 1:
        return x
    heads = x._packed.ndim - 3
    return _along(x, heads, lambda t: t.repeat_interleave(x._n_rep, dim=heads), n_rep=1)


def _axis_of(x: QuantTensor, dim: int, op: str) -> tuple[QuantTensor, int]:
    """Return x and the inner axis, with heads repeated for real if the axis is theirs."""
    axis = _axis(x, dim, op)
    return (_plain(x) if axis == x.ndim - 3 else x), axis


def _prepended(t: Tensor, ndim: int) -> Tensor:
    return t.reshape((1,) * (ndim - t.ndim) + t.shape)


def _untransposed(x: QuantTensor, op: str) -> QuantTensor:
    if x._transposed:
        raise UnsupportedError(f"{op} of a transposed QuantTensor is not defined; apply it first")
    return _plain(x)


# ---- one axis at a time --------------------------------------------------------------------


@on(aten.slice.Tensor)
def _slice(
    x: QuantTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> QuantTensor:
    size = x.shape[dim]
    if start in (None, 0) and (end is None or end >= size) and step == 1:
        return x._map(aten.alias.default)
    x, axis = _axis_of(x, dim, "slicing")
    return _along(x, axis, lambda t: aten.slice.Tensor(t, axis, start, end, step))


@on(aten.index_select.default)
def _index_select(x: QuantTensor, dim: int, index: Tensor) -> QuantTensor:
    x, axis = _axis_of(x, dim, "index_select")
    return _along(x, axis, lambda t: t.index_select(axis, index))


@on(aten.select.int)
def _select(x: QuantTensor, dim: int, index: int) -> QuantTensor:
    x, axis = _axis_of(_untransposed(x, "select"), dim, "select")
    return _rebuild(
        x,
        lambda t: t.select(axis, index),
        lambda t: t.select(axis, index if t.shape[axis] > 1 else 0),
    )


@on(aten.unbind.int)
def _unbind(x: QuantTensor, dim: int = 0) -> tuple[QuantTensor, ...]:
    return tuple(_select(x, dim, i) for i in range(x.shape[dim]))


@on(aten.split_with_sizes.default)
def _split_with_sizes(x: QuantTensor, sizes: Sequence[int], dim: int = 0) -> list[QuantTensor]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_slice(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@on(aten.split.Tensor)
def _split(x: QuantTensor, size: int, dim: int = 0) -> list[QuantTensor]:
    return [_slice(x, dim, start, start + size) for start in range(0, x.shape[dim], size)]


@on(aten.flip.default)
def _flip(x: QuantTensor, dims: Sequence[int]) -> QuantTensor:
    for dim in dims:
        x, axis = _axis_of(x, dim, "flip")
        x = _along(x, axis, lambda t, axis=axis: t.flip(axis))
    return x


@on(aten.repeat_interleave.self_int, torch.Tensor.repeat_interleave, torch.repeat_interleave)
def _repeat_interleave(
    x: QuantTensor, repeats: int | Tensor, dim: int | None = None, **kwargs: Any
) -> QuantTensor:
    if dim is None:
        raise UnsupportedError("repeat_interleave of a QuantTensor needs dim=")
    x, axis = _axis_of(x, dim, "repeat_interleave")
    return _along(x, axis, lambda t: t.repeat_interleave(repeats, dim=axis))


@on(aten.index.Tensor)
def _index(x: QuantTensor, indices: Sequence[Tensor | None]) -> QuantTensor:
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if len(used) == 1 and indices[used[0]].ndim == 1:  # type: ignore[union-attr]
        x, axis = _axis_of(x, used[0], "indexing")
        full = [None] * axis + [indices[used[0]]]
        return _along(x, axis, lambda t: aten.index.Tensor(t, full))
    for dim in used:
        x, _ = _axis_of(_untransposed(x, "indexing"), dim, "indexing")
    if not _has_shared_statistics(x):
        raise UnsupportedError(
            "indexing several axes of a QuantTensor with a shift or equalizer of its own for each "
            "head is not defined; index one axis at a time"
        )
    packed = aten.index.Tensor(x._packed, indices)
    return _rebuild(
        x, lambda t: aten.index.Tensor(t, indices), lambda t: _prepended(t.flatten(), packed.ndim)
    )


def _has_shared_statistics(x: QuantTensor) -> bool:
    return all(t is None or t.numel() == x._dim for t in (x._shift, x._equalizer))


# ---- shapes ----------------------------------------------------------------------------------


@on(aten.transpose.int)
def _transpose(x: QuantTensor, dim0: int, dim1: int) -> QuantTensor:
    dims = list(range(x.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permute(x, dims)


on(aten.t.default)(lambda x: _transpose(x, 0, 1) if x.ndim == 2 else x)


@on(aten.permute.default)
def _permute(x: QuantTensor, dims: Sequence[int]) -> QuantTensor:
    dims = [dim % x.ndim for dim in dims]
    last = x.ndim - 1
    if dims == list(range(x.ndim)):
        return x._map(aten.alias.default)
    if dims == [*range(x.ndim - 2), last, last - 1]:
        return x._map(aten.alias.default, transposed=not x._transposed)
    x = _untransposed(x, "permute")
    if dims[-1] != last:
        raise UnsupportedError(
            "permuting the channels of a QuantTensor with another axis is defined for the last two "
            "axes only; dequantize() first"
        )
    return _rebuild(x, lambda t: t.permute(dims), lambda t: t.permute(dims))


@on(aten.unsqueeze.default)
def _unsqueeze(x: QuantTensor, dim: int) -> QuantTensor:
    x, dim = _untransposed(x, "unsqueeze"), dim % (x.ndim + 1)
    if dim == x.ndim:
        raise UnsupportedError("a QuantTensor's last axis is its channels; unsqueeze before it")
    return x._map(lambda t: t.unsqueeze(dim))


@on(aten.squeeze.dim)
def _squeeze(x: QuantTensor, dim: int) -> QuantTensor:
    if x.shape[dim] != 1:
        return x._map(aten.alias.default)
    x, axis = _axis_of(_untransposed(x, "squeeze"), dim, "squeeze")
    return _rebuild(x, lambda t: t.squeeze(axis), lambda t: t.squeeze(axis))


@on(aten.squeeze.dims)
def _squeeze_dims(x: QuantTensor, dims: Sequence[int]) -> QuantTensor:
    for dim in sorted((dim % x.ndim for dim in dims), reverse=True):
        x = _squeeze(x, dim)
    return x


@on(aten.squeeze.default)
def _squeeze_all(x: QuantTensor) -> QuantTensor:
    return _squeeze_dims(x, [dim for dim in range(x.ndim - 1) if x.shape[dim] == 1])


@on(aten.expand.default)
def _expand(x: QuantTensor, sizes: Sequence[int], *, implicit: bool = False) -> QuantTensor:
    x = _untransposed(x, "expand")
    _check_channels(x, sizes[-1], "expand")
    lead = sizes[:-1]
    return _rebuild(
        x, lambda t: t.expand(*lead, t.shape[-1]), lambda t: _prepended(t, len(sizes))
    )


@on(aten.repeat.default)
def _repeat(x: QuantTensor, repeats: Sequence[int]) -> QuantTensor:
    x = _untransposed(x, "repeat")
    if repeats[-1] != 1:
        raise UnsupportedError("repeating the channels of a QuantTensor is not defined")

    def repeat_statistic(t: Tensor) -> Tensor:
        t = _prepended(t, len(repeats))
        return t.repeat([r if size > 1 else 1 for r, size in zip(repeats, t.shape, strict=True)])

    return _rebuild(x, lambda t: t.repeat(*repeats), repeat_statistic)


@on(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
@on(torch.Tensor.reshape, torch.reshape, torch.Tensor.view)
def _reshape(x: QuantTensor, *shape: Any) -> QuantTensor:
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        raise UnsupportedError("a QuantTensor cannot be viewed as another dtype; use .to(dtype)")
    sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    if x.shape == torch.Size(s for s in sizes if s != -1) or not sizes:
        return x._map(aten.alias.default)
    if -1 in sizes:
        known = -torch.Size(sizes).numel()
        sizes[sizes.index(-1)] = x.numel() // known if known else 0
    repeated = _lazily_repeated(x, sizes)
    if repeated is not None:
        return repeated
    x = _untransposed(x, "reshape")
    _check_channels(x, sizes[-1], "reshape")
    lead = sizes[:-1]

    def reshape_statistic(t: Tensor) -> Tensor:
        if t.numel() == x._dim:
            return _prepended(t.flatten(), len(sizes))
        if x.ndim < 2 or len(lead) < 1 or lead[-1] != x.shape[-2]:
            return t.expand(*x.shape[:-1], x._dim).reshape(sizes)  # _rebuild refuses mixed rows
        return t.expand(*x.shape[:-2], 1, x._dim).reshape(*lead[:-1], 1, x._dim)

    return _rebuild(x, lambda t: t.reshape(*lead, t.shape[-1]), reshape_statistic)


def _check_channels(x: QuantTensor, size: int, op: str) -> None:
    if size not in (-1, x._dim):
        raise UnsupportedError(
            f"{op} must keep the last axis of a QuantTensor at {x._dim} channels; got {size}"
        )


def _lazily_repeated(x: QuantTensor, sizes: Sequence[int]) -> QuantTensor | None:
    """Recognize the end of transformers' `repeat_kv`: (B, H, n expanded, S, D) -> (B, H n, S, D).

    The repetition stays a number: attention reads each head's codes once for all its queries.
    """
    if x.ndim != 5 or len(sizes) != 4 or x._transposed or x._packed.stride(2) != 0:
        return None
    b, h, n, s, d = x.shape
    if list(sizes) != [b, h * n, s, d]:
        return None
    return _rebuild(x, lambda t: t.select(2, 0), lambda t: t.select(2, 0), n_rep=n)


# ---- several tensors -----------------------------------------------------------------------


@on(aten.cat.default)
def _cat(tensors: Sequence[QuantTensor], dim: int = 0) -> QuantTensor:
    first = tensors[0]
    _check_same_code(tensors, "cat")
    tensors = [_plain(t) for t in tensors]
    axis = _axis(first, dim, "cat")
    rows = axis == first._packed.ndim - 2

    def statistic(name: str) -> Tensor | None:
        parts = [getattr(t, name) for t in tensors]
        if all(part is None or part is parts[0] for part in parts) and parts[-1] is parts[0]:
            if parts[0] is None or parts[0].shape[axis] == 1:
                return parts[0]
        if any(part is None for part in parts):
            raise _different_statistics("cat")
        if rows or all(part.shape[axis] == 1 for part in parts):
            if all(_same(part, parts[0]) for part in parts):
                return parts[0]
            if rows:
                raise _different_statistics("cat")
        full = [part.expand(*_sizes_at(part, axis, t)) for part, t in zip(parts, tensors)]
        return torch.cat(full, axis)

    return QuantTensor._make(
        torch.cat([t._packed for t in tensors], axis),
        torch.cat([t._scales for t in tensors], axis),
        statistic("_shift"),
        statistic("_equalizer"),
        tensors[0]._meta(),
    )


def _sizes_at(part: Tensor, axis: int, x: QuantTensor) -> list[int]:
    return [x._packed.shape[i] if i == axis else size for i, size in enumerate(part.shape)]


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return has_values(a) and a.shape == b.shape and torch.equal(a, b)


def _different_statistics(op: str) -> UnsupportedError:
    return UnsupportedError(
        f"{op} along the rows needs QuantTensors of one shift and equalizer; dequantize() them, or "
        "quantize them together"
    )


def _check_same_code(tensors: Sequence[Any], op: str) -> None:
    kinds = {(t._meta()[:2], t._transposed) if isinstance(t, QuantTensor) else type(t).__name__
             for t in tensors}  # fmt: skip
    if len(kinds) != 1:
        raise UnsupportedError(
            f"{op} needs QuantTensors of one spec; got {sorted(map(str, kinds))}; quantize or "
            "dequantize() the others"
        )


@on(aten.stack.default)
def _stack(tensors: Sequence[QuantTensor], dim: int = 0) -> QuantTensor:
    dim = dim % (tensors[0].ndim + 1)
    return _cat([_unsqueeze(t, dim) for t in tensors], dim)


@on(aten.equal.default)
def _equal(a: QuantTensor, b: QuantTensor) -> bool:
    """Return whether both hold the same codes (not: stand for the same numbers)."""
    if not (isinstance(a, QuantTensor) and isinstance(b, QuantTensor)):
        raise UnsupportedError("equal of a QuantTensor and a dense tensor; dequantize() it first")
    if a._meta()[:2] != b._meta()[:2] or a.shape != b.shape or a._inner().keys() != b._inner().keys():
        return False
    return all(torch.equal(t, b._inner()[name]) for name, t in a._inner().items())


# ---- copies and moves ----------------------------------------------------------------------


@on(aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift.default)
def _alias(x: QuantTensor) -> QuantTensor:
    return x._map(aten.alias.default)


@on(aten.clone.default, aten.contiguous.default)
def _clone(x: QuantTensor, *, memory_format: Any = None) -> QuantTensor:
    return x._map(lambda t: t.clone(memory_format=torch.contiguous_format))


@on(aten._to_copy.default)
def _to_copy(
    x: QuantTensor, *, dtype: torch.dtype | None = None, device: Any = None,
    non_blocking: bool = False, **kwargs: Any,
) -> QuantTensor:  # fmt: skip
    dtype = x.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise UnsupportedError(f"a QuantTensor stands for floats; dequantize() before .to({dtype})")
    return x._map(lambda t: t.to(device=device, non_blocking=non_blocking, copy=True), dtype=dtype)


@on(aten._pin_memory.default, aten.pin_memory.default)
def _pin_memory(x: QuantTensor, device: Any = None) -> QuantTensor:
    return x._map(lambda t: t.pin_memory())


@on(aten.is_pinned.default)
def _is_pinned(x: QuantTensor, device: Any = None) -> bool:
    return all(t.is_pinned() for t in x._inner().values())


@on(aten.copy_.default)
def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy codes to codes; quantize dense values into codes; decode codes into dense memory."""
    if not isinstance(target, QuantTensor):
        return target.copy_(source.dequantize(target.dtype), non_blocking)  # type: ignore[operator]
    if not isinstance(source, QuantTensor):
        target = _untransposed(target, "writing dense values")
        dense = source.to(target.device).expand(target.shape)
        parts = (target._shift, target._equalizer, target._spec_key)
        packed, scales = quantize_op.quantize(dense, *parts)
        target._packed.copy_(packed)
        target._scales.copy_(scales)
        return target
    _check_same_code([target, source], "copy_")
    theirs = _plain(source)._inner()
    if target._inner().keys() != theirs.keys():
        raise UnsupportedError("copy_ between QuantTensors with and without a shift or equalizer")
    for name, inner in target._inner().items():
        inner.copy_(theirs[name], non_blocking)
    return target


@on(aten.index_copy_.default)
def _index_copy(x: QuantTensor, dim: int, index: Tensor, source: QuantTensor) -> QuantTensor:
    _check_same_code([x, source], "index_copy_")
    axis = _axis(x, dim, "index_copy_")
    for name in ("_shift", "_equalizer"):
        ours, theirs = getattr(x, name), getattr(source, name)
        if (ours is None) != (theirs is None) or (ours is not None and not _same(ours, theirs)):
            raise _different_statistics("index_copy_")
    x._packed.index_copy_(axis, index, source._packed)
    x._scales.index_copy_(axis, index, source._scales)
    return x
