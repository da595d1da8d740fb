"""Vectors kept beside their codes, to put candidates in their true order.

    float16   (n, dim) fp16
    int8      (n, dim + 4) int8: round(x / s), and the bytes of the fp32 s = max |x| / 127

In memory they are a part of the rows of an index. In a file they are rows of one safetensors
tensor, appended and never moved: the index keeps the place of each of its vectors.

    [ 8 bytes + header, 1024 in all ][ row 0 ][ row 1 ] ...

A batch is on the disk before the header counts it. What a crash leaves behind the last row that is
counted is overwritten by the next append.
"""

from __future__ import annotations

import json
import os
from io import FileIO
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from quantforge.errors import FormatError, InputError
from quantforge.io.atomic import replacing
from quantforge.io.header import make_metadata

Kind = Literal["float16", "int8"]
FORMAT = 1
HEADER_BYTES = 1024
LEVELS = 127
SCALE_BYTES = 4
DTYPES: dict[str, tuple[str, Any]] = {"float16": ("F16", np.float16), "int8": ("I8", np.int8)}


def pack(x: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return finite float32 vectors (n, dim) as they are kept.

    Raises:
        InputError: for a number beyond fp16, if that is how they are kept.
    """
    if kind == "float16":
        if bool((x.abs() > torch.finfo(torch.float16).max).any()):
            raise InputError(
                f"a number of {float(x.abs().max()):.3g} is beyond fp16; rescale the vectors, or "
                'use originals="int8"'
            )
        return x.to(torch.float16)
    if not len(x):  # torch has no bytes of an empty tensor
        return x.new_empty(0, x.shape[1] + SCALE_BYTES, dtype=torch.int8)
    scale = x.abs().amax(-1, keepdim=True) / LEVELS
    codes = (x / torch.where(scale > 0, scale, 1.0)).round().to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], dim=1)


def unpack(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the vectors (n, dim) of rows that `pack` made, float32."""
    if rows.dtype == torch.float16:
        return rows.float()
    if not len(rows):
        return rows.new_empty(0, dim, dtype=torch.float32)
    return rows[:, :dim] * rows[:, dim:].clone().view(torch.float32)


def row_bytes(kind: str, dim: int) -> int:
    """Return the bytes of one kept vector."""
    return 2 * dim if kind == "float16" else dim + SCALE_BYTES


class OriginalsFile:
    """Kept vectors in a safetensors file that grows.

    Several indexes may read it. One at a time may append.

    Args:
        path: of a file that `create` made.

    Raises:
        FormatError: for a damaged file or another kind of file.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._view: np.ndarray | None = None
        self.kind, self.dim, self._count = self._read_header()

    @classmethod
    def create(cls, path: str | PathLike[str], dim: int, kind: Kind) -> OriginalsFile:
        """Write a file without vectors.

        Raises:
            InputError: if the path is taken.
        """
        if Path(path).exists():
            raise InputError(f"{path} exists; open it, or give another path")
        with replacing(Path(path)) as file:
            file.write(_header(dim, kind, 0))
        return cls(path)

    def __len__(self) -> int:
        return self._count

    def __deepcopy__(self, memo: dict[int, Any]) -> OriginalsFile:
        return OriginalsFile(self.path)

    def append(self, x: torch.Tensor) -> torch.Tensor:
        """Add vectors (n, dim) and return their places (n,) int64; they are on the disk then.

        Raises:
            InputError: for numbers that cannot be kept.
            OSError: if the disk is full or fails; the file holds what it held.
        """
        rows = pack(x, self.kind).cpu().contiguous()
        _, _, count = self._read_header()
        start = HEADER_BYTES + count * row_bytes(self.kind, self.dim)
        with open(self.path, "r+b", buffering=0) as file:
            try:
                file.truncate(start)
                _write(file, start, rows.view(torch.uint8).flatten().numpy().data)
            except OSError:
                file.truncate(start)
                raise
            _write(file, 0, memoryview(_header(self.dim, self.kind, count + len(rows))))
        self._count = count + len(rows)
        return torch.arange(count, self._count)

    def take(self, places: torch.Tensor) -> torch.Tensor:
        """Return the vectors (m, dim) of places (m,), float32; reads their pages only.

        Raises:
            FormatError: for a place that the file does not have.
        """
        if not len(places):
            return torch.empty(0, self.dim)
        if int(places.max()) >= self._count:
            _, _, self._count = self._read_header()
        if int(places.max()) >= self._count:
            raise FormatError(
                f"{self.path} holds {self._count} vectors, the index knows {int(places.max()) + 1} "
                "of them; restore the file that belongs to the index"
            )
        if self._view is None or len(self._view) < self._count:
            dtype = np.dtype(DTYPES[self.kind][1])
            shape = (self._count, row_bytes(self.kind, self.dim) // dtype.itemsize)
            self._view = np.memmap(self.path, dtype, "r", offset=HEADER_BYTES, shape=shape)
        return unpack(torch.from_numpy(np.array(self._view[places.cpu().numpy()])), self.dim)

    def _read_header(self) -> tuple[Kind, int, int]:
        """Return kind, dim and count."""
        with open(self.path, "rb") as file:
            head = file.read(HEADER_BYTES)
        try:
            if int.from_bytes(head[:8], "little") != HEADER_BYTES - 8:
                raise ValueError("no header of originals")
            header = json.loads(head[8:])
            said = json.loads(header["__metadata__"]["originals"])
            if said["format"] != FORMAT:
                raise FormatError(
                    f"{self.path} holds originals of format {said['format']}; this version reads "
                    f"{FORMAT}"
                )
            kind, dim, count = said["kind"], said["dim"], header["rows"]["shape"][0]
            if head != _header(dim, kind, count):
                raise ValueError("inconsistent header")
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{self.path} is no file of originals: {error!r}") from error
        size, expected = self.path.stat().st_size, HEADER_BYTES + count * row_bytes(kind, dim)
        if size < expected:
            raise FormatError(f"{self.path} is cut: it must have {expected} bytes; got {size}")
        return kind, dim, count


def _header(dim: int, kind: str, count: int) -> bytes:
    code, dtype = DTYPES[kind]
    size = row_bytes(kind, dim)
    said = {"format": FORMAT, "kind": kind, "dim": dim}
    shape = [count, size // np.dtype(dtype).itemsize]
    header = {
        "__metadata__": make_metadata({}, {"originals": json.dumps(said)}),
        "rows": {"dtype": code, "shape": shape, "data_offsets": [0, count * size]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    return (HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8)


def _write(file: FileIO, at: int, data: memoryview) -> None:
    """Write all of it and wait until it is on the disk."""
    file.seek(at)
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())
