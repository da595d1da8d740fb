"""Copies, moves and writes of packed codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quantforge.dispatch.layout import (
    STATISTICS,
    Tensor,
    alias,
    aten,
    check_same_code,
    different_statistics,
    flipped,
    inner_axis,
    plain,
    same_statistics,
)
from quantforge.dispatch.register import on
from quantforge.dispatch.views import index_tensors, indexable
from quantforge.errors import UnsupportedError
from quantforge.ops.statistics import flatten, is_shared
from quantforge.tensor import QuantTensor

on(aten.detach.default, aten.alias.default)(alias)


@on(aten.clone.default)
def _clone(x: QuantTensor, *, memory_format: Any = None) -> QuantTensor:
    return x._map(lambda t: t.clone(memory_format=torch.contiguous_format))


@on(torch.Tensor.contiguous, aten.contiguous.default)
def _contiguous(x: QuantTensor, memory_format: Any = None) -> QuantTensor:
    return x if all(t.is_contiguous() for t in x._inner().values()) else _clone(x)


@on(aten._to_copy.default)
def _to_copy(
    x: QuantTensor, *, dtype: torch.dtype | None = None, device: Any = None,
    non_blocking: bool = False, **kwargs: Any,
) -> QuantTensor:  # fmt: skip
    """Move the codes; a dtype changes what they stand for, not what is stored."""
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


# ---- writes --------------------------------------------------------------------------------


@on(aten.copy_.default)
def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy codes to codes; quantize dense values into codes; decode codes into dense memory."""
    if not isinstance(target, QuantTensor):
        return target.copy_(source.dequantize(), non_blocking)
    if not isinstance(source, QuantTensor):
        source = _coded_like(target, source.expand(target.shape))
    target, source = _writable(target, "copy_"), plain(source)
    check_same_code([target, source], "copy_")
    names = ["_packed", "_scales", *_statistics_to_copy(target, source)]
    for name in names:
        getattr(target, name).copy_(getattr(source, name), non_blocking)
    return target


def _statistics_to_copy(target: QuantTensor, source: QuantTensor) -> list[str]:
    """Return the statistics that a copy overwrites: those of a whole tensor, never of a part.

    Views share their shift and equalizer with the rest of the vectors of their base.
    """
    if same_statistics(target, source):
        return []
    whole = target._packed.untyped_storage().nbytes() == target._packed.numel()
    ours, theirs = target._inner(), source._inner()
    if (
        not whole
        or [*ours] != [*theirs]
        or any(t.shape != theirs[n].shape for n, t in ours.items())
    ):
        raise different_statistics("copy_")
    return [name for name in STATISTICS if name in ours]


def _writable(x: QuantTensor, op: str) -> QuantTensor:
    """Return x, or raise if its heads are repeated and a write would meet each several times."""
    if x._n_rep > 1:
        raise UnsupportedError(f"{op} into repeated heads; write before repeating, or clone rows")
    return x


def _coded_like(target: QuantTensor, source: Tensor) -> QuantTensor:
    """Quantize dense values with the code, shift and equalizer of target."""
    if target._transposed:
        return flipped(_coded_like(flipped(target), source.mT))
    statistics = [t if t is None or not is_shared(t) else flatten(t)
                  for t in (target._shift, target._equalizer)]  # fmt: skip
    source = source.to(target.device)
    coded = QuantTensor.quantize(source, target.spec, shift=statistics[0], equalizer=statistics[1])
    # the same objects, so that they are known to be equal while tracing
    parts = (coded._packed, coded._scales, target._shift, target._equalizer)
    return QuantTensor._make(*parts, coded._meta(dtype=target.dtype))


@on(aten.index_copy_.default)
def _index_copy(x: QuantTensor, dim: int, index: Tensor, source: Tensor) -> QuantTensor:
    """Write rows of codes; the vectors keep their shift and equalizer, so these must be equal."""
    axis = inner_axis(_writable(x, "index_copy_"), dim, "index_copy_")
    if any(t is not None and t.shape[axis] > 1 for t in (x._shift, x._equalizer)):
        raise different_statistics("index_copy_")
    source = _source(x, source, "index_copy_")
    for name in ("_packed", "_scales"):
        getattr(x, name).index_copy_(axis, index, getattr(source, name))
    return x


def _source(target: QuantTensor, source: Tensor, op: str) -> QuantTensor:
    """Return what is to be written in the code of target, or raise if it is in another."""
    if not isinstance(source, QuantTensor):
        return _coded_like(target, source)
    check_same_code([target, source], op)
    if not same_statistics(target, source):
        raise different_statistics(op)
    return plain(source)


@on(aten.index_put_.default)
def _index_put(
    x: QuantTensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> QuantTensor:
    if accumulate or not (is_shared(x._shift) and is_shared(x._equalizer)):
        raise UnsupportedError("this index_put_ into a QuantTensor; write through a slice instead")
    indices = index_tensors(indices)
    indexable(_writable(x, "index_put_"), [i for i, t in enumerate(indices) if t is not None])
    source = _source(x, values, "index_put_")
    for name in ("_packed", "_scales"):
        aten.index_put_.default(getattr(x, name), indices, getattr(source, name))
    return x
