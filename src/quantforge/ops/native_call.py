"""What every native operator needs: tensors as rows of groups, and when the library can run.

Leading axes are groups, each with a base address of its own, so strided caches and expanded
tensors are read where they are; only a last axis with a stride is copied.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from quantforge.native.code import NativeCode, Packed, Rows, native_code
from quantforge.native.library import Library, library
from quantforge.ops.statistics import equalize_query, restore
from quantforge.ops.transform import rotate, unrotate
from quantforge.spec import QuantSpec

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""As in kernels.h."""


def cannot_run(*specs: QuantSpec, device: torch.device) -> str | None:
    """Return why the native library cannot run specs on a device, or None."""
    if device.type != "cpu":
        return f"native kernels run on the CPU, the tensors are on {device}"
    for spec in specs:
        if spec.estimator == "prod":
            return "native kernels have no QJL residual"
    found = library()
    return None if isinstance(found, Library) else found


def loaded() -> Library:
    """Return the library, which `cannot_run` has found."""
    found = library()
    assert isinstance(found, Library), "supports() was not asked"
    return found


def code_of(spec: QuantSpec) -> NativeCode:
    """Return the C structure of a spec for the level in use."""
    return native_code(spec, loaded().byte_offset)


@lru_cache(maxsize=1024)
def _offsets(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[NDArray[np.int64], int]:
    """Return the offset of each group, and the address of these."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(sizes, strides, strict=True):
        offsets = (offsets[:, None] + stride * np.arange(size, dtype=np.int64)).ravel()
    return offsets, offsets.ctypes.data


def _group_offsets(t: torch.Tensor, unit: int) -> tuple[NDArray[np.int64], int]:
    strides = tuple(unit * stride for stride in t.stride()[:-2])
    return _offsets(tuple(t.shape[:-2]), strides)


class Operand(NamedTuple):
    """A C structure with the tensors and arrays that it points to."""

    structure: ctypes.Structure
    keep: tuple[object, ...]

    @property
    def pointer(self) -> object:
        """What a C function takes."""
        return ctypes.byref(self.structure)


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """Return t with its last axis contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def rows_of(t: torch.Tensor, lead: torch.Size) -> Operand:
    """Return the rows of t (..., n, width), leading axes expanded to `lead`."""
    t = unit_stride(t)
    t = t if t.shape[:-2] == lead else t.expand(*lead, -1, -1)
    size = t.element_size()
    offsets, address = _group_offsets(t, size)
    rows = Rows(t.data_ptr(), address, t.stride(-2) * size)
    return Operand(rows, (t, offsets))


def packed_of(
    packed: torch.Tensor, scales: torch.Tensor, spec: QuantSpec, lead: torch.Size
) -> Operand:
    """Return packed vectors (..., n, bytes) with their scales (..., n, 1)."""
    code, rows, scale_rows = code_of(spec), rows_of(packed, lead), rows_of(scales, lead)
    structure = Packed(code.address, rows.structure, scale_rows.structure)
    return Operand(structure, (code, rows, scale_rows))


class Statistic(NamedTuple):
    """A shift or equalizer as a C function takes it: (address, address of offsets)."""

    arguments: tuple[int | None, int | None]
    keep: tuple[object, ...] = ()


def statistic_of(t: torch.Tensor | None, lead: torch.Size) -> Statistic:
    """Return a statistic (dim,) or (..., 1, dim) for each group of `lead`, in float32."""
    if t is None:
        return Statistic((None, None))
    t = unit_stride(t.to(torch.float32))
    t = (t.unsqueeze(0) if t.ndim == 1 else t).expand(*lead, -1, -1)
    offsets, address = _group_offsets(t, 1)
    return Statistic((t.data_ptr(), address), (t, offsets))


def turn(x: torch.Tensor, spec: QuantSpec, *, inverse: bool = False) -> torch.Tensor:
    """Return `R x`, or `R^T x`, of rows (..., dim) in float32: contiguous and new."""
    if spec.rotation != "hadamard":
        turned = (unrotate if inverse else rotate)(x, spec, spec.seed).contiguous()
        return turned.clone() if turned is x else turned
    x = x.contiguous()
    out = torch.empty_like(x)
    sizes = (x.numel() // spec.dim, x.data_ptr(), out.data_ptr())
    loaded().call("qf_rotate", code_of(spec).address, *sizes, inverse, torch.get_num_threads())
    return out


def project(
    query: torch.Tensor, equalizer: torch.Tensor | None, spec: QuantSpec, shape: torch.Size
) -> torch.Tensor:
    """Return queries as kernels take them: equalized, rotated, expanded, contiguous float32."""
    return turn(equalize_query(query, equalizer), spec).expand(shape).contiguous()


def unproject(
    total: torch.Tensor,
    spec: QuantSpec,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """Return `equalizer * R^T total + weight * shift`."""
    return restore(turn(total, spec, inverse=True), shift, equalizer, weight)
