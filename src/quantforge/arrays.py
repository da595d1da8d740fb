"""Arrays as the front end meets them: numpy or torch, on disk or in memory, read in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from os import PathLike
from tokenize import TokenError
from typing import Any, TypeAlias

import numpy as np
import torch

from quantforge.errors import FormatError, InputError
from quantforge.tensor import Container, QuantTensor

Array: TypeAlias = Any
"""A torch.Tensor, a numpy array (np.memmap too), or an object with shape, dtype and slices that
numpy can read, such as an h5py dataset."""

CHUNK_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Numbers worked on at a time: 4 MiB of float32 on CPU."""
BAR_DELAY_S = 2.0
"""Work that takes less shows no progress bar."""

_TORCH_DTYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}
_NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch_dtype: dtype for dtype, torch_dtype in _TORCH_DTYPES.items()
}


@dataclass(frozen=True, eq=False)
class Source:
    """An array of vectors that has been checked, to be read in pieces.

    Attributes:
        array: what the user gave.
        shape: its shape, (..., dim).
        dtype: its dtype, as torch has it.
        device: where it is.
        container: what it is.
    """

    array: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    container: Container

    @classmethod
    def of(cls, x: Array, dim: int) -> Source:
        """Check an array of vectors of one dim.

        Raises:
            InputError: for a wrong shape or dtype.
        """
        shape = tuple(getattr(x, "shape", ()))
        if isinstance(x, torch.Tensor):
            source = cls(x, shape, _check_tensor(x), x.device, "torch")
        else:
            source = cls(x, shape, _check_array(x), torch.device("cpu"), "numpy")
        if not shape or shape[-1] != dim:
            raise InputError(
                f"x must have shape (..., {dim}), by the dim of this pipeline; got {shape}"
            )
        return source

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return prod(self.shape[:-1])

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield the vectors in order, as (n, dim) tensors of bounded size; at least one."""
        dim = self.shape[-1]
        if self.rows == 0:
            yield torch.empty(0, dim, dtype=self.dtype, device=self.device)
        elif len(self.shape) == 1:
            yield as_tensor(self.array[:]).reshape(1, dim)
        else:
            for part in pieces(self.array, CHUNK_NUMBERS[self.device.type]):
                yield as_tensor(part).reshape(-1, dim)

    def __getitem__(self, index: tuple[int, ...]) -> torch.Tensor:
        """Return one vector as a tensor; for error messages."""
        return as_tensor(self.array[index])


def pieces(x: Any, limit: int) -> Iterator[Any]:
    """Yield slices of x (..., n, dim) in order, each of about `limit` numbers at most."""
    per_row = max(prod(x.shape[1:]), 1)
    if x.ndim > 2 and per_row > limit:
        for i in range(x.shape[0]):
            yield from pieces(x[i], limit)
        return
    step = max(1, limit // per_row)
    for start in range(0, x.shape[0], step):
        yield x[start : start + step]


def _check_tensor(x: torch.Tensor) -> torch.dtype:
    if isinstance(x, QuantTensor):
        raise InputError("x is a QuantTensor already; dequantize() it to compress it again")
    if x.layout != torch.strided or not x.dtype.is_floating_point:
        raise InputError(
            f"x must be a dense floating-point tensor; got {x.dtype}, {x.layout}; use x.float(), "
            "x.to_dense(), or compress x.real and x.imag"
        )
    return x.dtype


def _check_array(x: Any) -> torch.dtype:
    if isinstance(x, np.ma.MaskedArray):
        raise InputError("x is a masked array, whose mask would be lost; use x.filled(0)")
    if not all(hasattr(x, name) for name in ("shape", "dtype", "ndim", "__getitem__")):
        raise InputError(
            f"x must be a numpy array or a torch.Tensor; got {type(x).__name__}; use "
            "np.asarray(x, dtype=np.float32), or compress_stream(x) for an iterable of arrays"
        )
    try:
        dtype = _TORCH_DTYPES.get(np.dtype(x.dtype).newbyteorder("="))
    except TypeError:
        dtype = None
    if dtype is None:
        raise InputError(
            f"x must hold float16, float32 or float64; got {x.dtype}; use x.astype(np.float32) "
            "(or compress x.real and x.imag)"
        )
    return dtype


def as_tensor(part: Any) -> torch.Tensor:
    """Return a piece as a tensor: shared memory where torch allows it, else a copy."""
    if isinstance(part, torch.Tensor):
        return part.detach()
    array = np.asarray(part)
    native = array.dtype.newbyteorder("=")
    if not array.flags.writeable:  # torch warns of read-only memory, though nothing writes here
        return torch.from_numpy(np.array(array, native))
    return torch.from_numpy(np.ascontiguousarray(array, native))


@contextmanager
def progress_bar(what: str, total: int | None, show: bool | None) -> Iterator[Callable[[int], Any]]:
    """Yield a function that counts vectors on a bar.

    `show=None` shows it on a terminal if the work takes long; True at once; False never.
    """
    # comes with transformers; `import quantforge` does not load it
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    delay = 0.0 if show else BAR_DELAY_S
    disable = None if show is None else not show
    with tqdm(
        desc=what, total=total, unit=" vectors", unit_scale=True, delay=delay, disable=disable
    ) as bar:
        yield bar.update


def as_container(t: torch.Tensor, container: Container) -> Array:
    """Return a tensor as it is, or as a numpy array.

    Raises:
        InputError: if numpy does not have its dtype.
    """
    if container == "torch":
        return t
    numpy_dtype(t.dtype)
    return t.cpu().numpy()


def check_quantized(q: torch.Tensor, dim: int) -> None:
    """Raise `InputError` unless q is a QuantTensor of vectors of this dim."""
    if not isinstance(q, QuantTensor):
        raise InputError(f"q must be a QuantTensor, as compress returns it; got {type(q).__name__}")
    if q.spec.dim != dim:
        raise InputError(f"q holds vectors of dim {q.spec.dim}; this object's dim is {dim}")


def as_query(x: Array, dim: int, device: torch.device) -> tuple[torch.Tensor, Container]:
    """Return vectors (..., dim) as one tensor on a device, and the container they came in."""
    container = Source.of(x, dim).container
    return (x if container == "torch" else as_tensor(x[:]).to(device)), container


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the numpy dtype, or raise `InputError` where there is none."""
    if dtype not in _NUMPY_DTYPES:
        raise InputError(f"numpy has no {dtype}; decode as another: q.to(torch.float32)")
    return _NUMPY_DTYPES[dtype]


def open_npy(path: str | PathLike[str]) -> np.ndarray:
    """Memory-map a .npy file; anything else is a `FormatError`."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, TypeError, OverflowError, SyntaxError, TokenError) as error:
        # the last four: a header that is no Python literal, or of an impossible shape
        raise FormatError(
            f"{path} is not a readable .npy file of numbers: {error}; load it yourself and give "
            "the array"
        ) from error
