"""Whether the tensors of an index file fit each other: kernels read what they are told to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from quantforge.errors import FormatError
from quantforge.numerics.packing import packed_width
from quantforge.spec import MAX_BITS, check_int
from quantforge.vectordb.codec import Codec
from quantforge.vectordb.lists import Lists, Partition

MAX_DIM = 1 << 20


def check_learned(learned: Mapping[str, np.ndarray], dim: Any) -> None:
    """Check shapes, dtypes and bits of what was learned of the data.

    Raises:
        FormatError: naming the tensor.
        ConfigError: for a dim that is none.
    """
    check_int("dim", dim, 1, MAX_DIM)
    for name, array in learned.items():
        shape = (dim, dim) if name == "basis" else (dim,)
        kinds = "iu" if name == "bits" else "f"
        if array.shape != shape or array.dtype.kind not in kinds:
            raise FormatError(f"{name} must have shape {shape}; got {array.dtype} {array.shape}")
        if not np.isfinite(array).all():
            raise FormatError(f"{name} must be finite")
    bits = learned.get("bits")
    if bits is not None and not (
        bits.min() >= 0 and 1 <= bits[0] <= MAX_BITS and (np.diff(bits) <= 0).all()
    ):
        raise FormatError(f"bits must fall, from at most {MAX_BITS} to 0 at least")


def check_partition(partition: Partition, dim: int) -> None:
    """Check where lists are; `FormatError` names what does not fit."""
    shape, count = tuple(partition.centroids.shape), len(partition.centroids)
    _check("lists.centroids", partition.centroids, torch.float32, (max(count, 1), dim))
    _check("lists.spreads", partition.spreads, torch.float32, (count,))
    if not bool(partition.spreads.isfinite().all()):
        raise FormatError("lists.spreads must be finite")
    if partition.curve.ndim != 1 or partition.curve.dtype != torch.float32:
        raise FormatError(f"lists.curve must be float32 (lists,); got {partition.curve.dtype}")
    if type(partition.coded) is not bool or type(partition.nprobe) is not int:
        raise FormatError("coded must be true or false, and nprobe a number")
    if not 1 <= partition.nprobe <= count:
        raise FormatError(f"nprobe must be from 1 to {count}; got {partition.nprobe}; {shape}")


def check_lists(lists: Lists, n: int) -> None:
    """Check which of n rows belong to which list; `FormatError` names what does not fit."""
    starts, tail = lists.starts, lists.tail
    _check("lists.starts", starts, torch.int64, (lists.count + 1,))
    _check("lists.tail", tail, torch.int32, (tail.numel(),))
    if int(starts[0]) or bool((starts.diff() < 0).any()) or int(starts[-1]) + len(tail) != n:
        raise FormatError(f"lists.starts must rise from 0 to {n - len(tail)}")
    if len(tail) and not 0 <= int(tail.min()) <= int(tail.max()) < lists.count:
        raise FormatError(f"lists.tail must name lists from 0 to {lists.count - 1}")


def check_parts(parts: Mapping[str, torch.Tensor], codec: Codec, dim: int) -> None:
    """Check what is held of each row; `FormatError` names what does not fit."""
    n = len(parts["ids"]) if parts["ids"].ndim else 0
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "scales": (torch.float16, (n, 1)),
        "offsets": (torch.float16, (n,)),
        "ids": (torch.int64, (n,)),
        "places": (torch.int64, (n,)),
    }
    for i, (spec, _) in enumerate(codec.groups):
        expected[f"packed{i}"] = (torch.uint8, (n, packed_width(spec)))
    if "originals" in parts:
        narrow = parts["originals"].dtype == torch.int8
        kind = torch.int8 if narrow else torch.float16
        expected["originals"] = (kind, (n, dim + 4 * narrow))
    for name, part in parts.items():
        _check(name, part, *expected[name])


def _check(name: str, t: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if t.dtype != dtype or tuple(t.shape) != shape:
        raise FormatError(
            f"{name} must be {dtype} of shape {shape}; got {t.dtype} of shape {tuple(t.shape)}"
        )
