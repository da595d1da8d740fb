"""Which reader takes which file, and which of its arrays is meant."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantforge.arrays import as_tensor, pieces
from quantforge.errors import InputError
from quantforge.inputs.arrow import arrow_entries, parquet_entries
from quantforge.inputs.entry import EIGHT_BITS, Entry
from quantforge.inputs.numpy_files import npy_entries, npz_entries, stdin_entries
from quantforge.inputs.rows import BLOCK_NUMBERS, AsFloat32
from quantforge.inputs.tensors import tensor_entries
from quantforge.inputs.texmex import texmex_entries

STDIN = "-"

READERS: dict[str, Callable[[Path], dict[str, Entry]]] = {
    ".npy": npy_entries,
    ".npz": npz_entries,
    ".safetensors": tensor_entries,
    ".json": tensor_entries,
    ".parquet": parquet_entries,
    ".arrow": arrow_entries,
    ".feather": arrow_entries,
    ".fvecs": texmex_entries,
    ".bvecs": texmex_entries,
}
SUFFIXES = tuple(suffix for suffix in READERS if suffix != ".json")


def list_arrays(path: str | PathLike[str]) -> dict[str, Entry]:
    """List what a file holds, by name, without reading it.

    Args:
        path: of the file, whose suffix says what it is; "-" reads a .npy file from stdin.

    Raises:
        InputError: for another suffix.
        FormatError: if the file is damaged.
        FileNotFoundError: if there is none.
        UnsupportedError: if it needs a package that is not installed.
    """
    if str(path) == STDIN:
        return stdin_entries()
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise InputError(
            f"{path}: files of vectors end in {', '.join(SUFFIXES)}, or are {STDIN!r} for .npy on "
            "stdin"
        )
    if not path.is_file() and not path.with_name(f"{path.name}.index.json").is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return READERS[path.suffix.lower()](path)


def open_vectors(path: str | PathLike[str], *, name: str | None = None) -> Any:
    """Open an array of vectors (..., dim) that is read in pieces.

    Args:
        path: as `list_arrays` takes it.
        name: of the array, where the file holds several of at least two axes.

    Returns:
        numpy.memmap, torch.Tensor or another array with slices, of a floating dtype; 8-bit
        integers are read as float32.

    Raises:
        InputError: if no array, or more than one, can be meant; and as `list_arrays`.
    """
    entries = list_arrays(path)
    if name is None:
        candidates = [key for key, entry in entries.items() if entry.holds_vectors]
        if len(candidates) != 1:
            raise InputError(
                f"{path} must hold one array of vectors, or one must be named; it has "
                f"{_listing(entries)}"
            )
        name = candidates[0]
    if name not in entries:
        raise InputError(f"{path} has no array {name!r}; it has {_listing(entries)}")
    array = entries[name].open()
    return AsFloat32(array) if entries[name].dtype in EIGHT_BITS else array


def _listing(entries: dict[str, Entry]) -> str:
    found = [f"{key!r} {entry.dtype} {entry.shape}" for key, entry in sorted(entries.items())]
    return ", ".join(found[:20]) + (f" and {len(found) - 20} more" if len(found) > 20 else "")


def sample(array: Any, rows: int) -> torch.Tensor:
    """Return at most `rows` vectors (m, dim), evenly taken from an array (..., dim).

    Cost: reads what is mapped at these rows, and a stream once; memory of the sample.
    """
    dim = array.shape[-1]
    count = int(np.prod(array.shape[:-1]))
    step = max(1, -(-count // rows))
    if isinstance(array, np.ndarray | torch.Tensor) and array.ndim == 2:
        return as_tensor(array[::step])
    parts, start = [torch.empty(0, dim)], 0
    for piece in pieces(array, BLOCK_NUMBERS):
        x = as_tensor(piece).reshape(-1, dim)
        parts.append(x[-start % step :: step].to(torch.float32))
        start += len(x)
    return torch.cat(parts)
