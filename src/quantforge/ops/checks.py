"""Validation shared by the public operator functions."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from quantforge.errors import InputError
from quantforge.numerics.packing import packed_width
from quantforge.spec import QuantSpec


def has_values(t: torch.Tensor) -> bool:
    """Return whether t can be looked at: not while tracing, and not a fake or meta tensor."""
    symbolic = isinstance(t, FakeTensor | FunctionalTensor)
    return not (torch.compiler.is_compiling() or t.is_meta or symbolic)


def check_floating(name: str, x: torch.Tensor) -> None:
    """Raise unless x is a floating-point tensor."""
    if not isinstance(x, torch.Tensor):
        raise InputError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise InputError(
            f"{name} must be a floating-point tensor; got {x.dtype}; use {name}.float()"
        )


def check_last_dim(name: str, x: torch.Tensor, dim: int) -> None:
    """Raise unless the last axis of x has `dim` entries."""
    if x.ndim == 0 or x.shape[-1] != dim:
        raise InputError(
            f"the last axis of {name} must have dim = {dim} entries; got shape {tuple(x.shape)}"
        )


def check_statistic(name: str, value: torch.Tensor | None, shape: torch.Size) -> None:
    """Raise unless a shift or equalizer is (dim,) or (..., 1, dim) broadcasting to `shape`."""
    if value is None:
        return
    check_floating(name, value)
    pairs = zip(reversed(value.shape), reversed(shape), strict=False)
    # torch.broadcast_shapes takes tens of microseconds, which a decode step pays in each layer
    fits = 0 < value.ndim <= len(shape) and all(size in (1, other) for size, other in pairs)
    if not fits or value.shape[-1] != shape[-1] or (value.ndim > 1 and value.shape[-2] != 1):
        raise InputError(
            f"{name} must have shape ({shape[-1]},), or (..., 1, {shape[-1]}) broadcasting "
            f"against {tuple(shape)}; got {tuple(value.shape)}"
        )


def check_packed(name: str, packed: torch.Tensor, scales: torch.Tensor, spec: QuantSpec) -> None:
    """Raise unless packed rows and their scales have the layout of a spec."""
    width = packed_width(spec)
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != width:
        raise InputError(
            f"{name} must be uint8 with rows of {width} bytes (dim {spec.dim}, {spec.bits} bits); "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    shape = (*packed.shape[:-1], spec.scales_per_vector)
    if tuple(scales.shape) != shape or scales.dtype != getattr(torch, spec.scale_dtype):
        raise InputError(
            f"the scales of {name} must be {spec.scale_dtype} of shape {shape}; got "
            f"{scales.dtype} of shape {tuple(scales.shape)}"
        )
    if scales.device != packed.device:
        raise InputError(f"{name} is on {packed.device} but its scales are on {scales.device}")


def check_batch(name: str, x: torch.Tensor, other: str, y: torch.Tensor) -> None:
    """Raise unless both are matrices or stacks of them whose leading axes broadcast."""
    try:
        ok = min(x.ndim, y.ndim) >= 2
        if x.shape[:-2] != y.shape[:-2]:  # the call costs more than short products
            torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        ok = False
    if not ok:
        raise InputError(
            f"{name} and {other} must be matrices or stacks of them with leading axes that "
            f"broadcast; got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
