"""Input of an index: vectors and ids, refused before anything is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quantforge.arrays import Source, as_tensor
from quantforge.errors import InputError

CPU = torch.device("cpu")


def vectors_of(
    x: Any,
    dim: int,
    *,
    unit_length: bool,
    what: str = "vectors",
    device: torch.device = CPU,
) -> torch.Tensor:
    """Return vectors (n, dim) as finite float32 on a device, of length 1 if asked for.

    Raises:
        InputError: for a wrong shape or dtype, NaN or infinity, or no direction to normalize.
    """
    if _is_plain(x, dim):
        found, finite = torch.from_numpy(x).to(device), bool(np.isfinite(x).all())
    else:
        source = Source.of(x, dim)
        if len(source.shape) != 2:
            raise InputError(f"{what} must have shape (n, {dim}); got {source.shape}; use x[None]")
        found = as_tensor(x if isinstance(x, torch.Tensor) else x[:]).to(device, torch.float32)
        finite = bool(found.isfinite().all())
    if not finite:
        row = int((~found.isfinite().all(-1)).nonzero()[0])
        raise InputError(f"{what} must be finite, but row {row} holds NaN or infinity")
    if not unit_length:
        return found
    length = found.norm(dim=-1, keepdim=True)
    if bool((length == 0).any()):
        row = int((length == 0).nonzero()[0, 0])
        raise InputError(f"{what} row {row} is zero and has no cosine; remove it")
    return found / length


def _is_plain(x: Any, dim: int) -> bool:
    """Whether x is what most callers have, and needs no look at its kind: it saves 0.1 ms."""
    return (
        type(x) is np.ndarray
        and x.dtype == np.float32
        and x.ndim == 2
        and x.shape[1] == dim
        and x.flags.c_contiguous
        and x.flags.writeable
    )


def ids_of(ids: Any, n: int | None = None) -> torch.Tensor:
    """Return distinct int64 ids (n,).

    Raises:
        InputError: for another dtype, another count, or an id that is there twice.
    """
    array = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"ids must be integers of shape (n,); got {array.dtype} of shape {array.shape}"
        )
    if n is not None and len(array) != n:
        raise InputError(f"there must be one id for each of the {n} vectors; got {len(array)}")
    found, counts = np.unique(array, return_counts=True)
    if len(found) != len(array):
        raise InputError(f"id {found[counts > 1][0]} is given twice; ids must be distinct")
    if len(array) and (int(found[0]) < 0 or int(found[-1]) >= 2**63):
        raise InputError(f"ids must be from 0 to 2^63 - 1; got {found[0]} to {found[-1]}")
    return torch.from_numpy(array.astype(np.int64))


def nprobe_of(nprobe: int | None, recall: float | None) -> int | None:
    """Return nprobe, of which and recall one may be given.

    Raises:
        InputError: for both, or values that make no sense.
    """
    if nprobe is not None and recall is not None:
        raise InputError("give nprobe or recall, not both")
    if nprobe is not None and (type(nprobe) is not int or nprobe < 1):
        raise InputError(f"nprobe must be a positive integer; got {nprobe!r}")
    if recall is not None and not 0 < recall <= 1:
        raise InputError(f"recall must be above 0 and at most 1; got {recall!r}")
    return nprobe


def rows_of_bitmap(bitmap: Any, n: int) -> torch.Tensor:
    """Return the rows, rising, whose bits are set in (ceil(n / 8),) uint8, least bits first.

    Raises:
        InputError: for another shape or dtype.
    """
    found = np.asarray(bitmap)
    if found.dtype != np.uint8 or found.shape != (-(-n // 8),):
        raise InputError(
            f"bitmap must be uint8 of shape ({-(-n // 8)},) for {n} vectors; got {found.dtype} of "
            f"shape {found.shape}"
        )
    return torch.from_numpy(np.flatnonzero(np.unpackbits(found, count=n, bitorder="little")))
