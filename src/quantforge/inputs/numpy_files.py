"""numpy's files: .npy is memory-mapped, .npz where its members are stored; the rest streams."""

from __future__ import annotations

import sys
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from quantforge.arrays import open_npy
from quantforge.errors import FormatError
from quantforge.inputs.entry import Entry
from quantforge.inputs.rows import Blocks, RowStream, rows_per_block
from quantforge.io.npy import Header, Member, members, open_archive, read_header, reading
from quantforge.io.npz import NAME, load_npz, npz_info

READ_BYTES = 1 << 22


def npy_entries(path: Path) -> dict[str, Entry]:
    """List the array of a .npy file under the file's name."""
    array = open_npy(path)
    return {path.stem: Entry(array.shape, array.dtype.name, lambda: array)}


def stdin_entries() -> dict[str, Entry]:
    """List the array that comes on stdin in .npy format; it can be read once."""
    file = sys.stdin.buffer
    header = read_header("stdin", file)
    stream = RowStream(
        "stdin", header.shape, header.dtype, lambda: _blocks("stdin", file, header), once=True
    )
    return {"stdin": Entry(header.shape, header.dtype.name, lambda: stream)}


def npz_entries(path: Path) -> dict[str, Entry]:
    """List the arrays of a .npz file, or the QuantTensor of one that quantforge wrote.

    Raises:
        FormatError: if it is damaged, or holds something else than numbers.
    """
    info = npz_info(path)
    if info is not None:
        dtype = str(info.dtype).removeprefix("torch.")
        return {NAME: Entry(info.shape, dtype, partial(load_npz, path), info.spec)}
    return {
        name: Entry(member.header.shape, member.header.dtype.name, partial(_open, member))
        for name, member in members(path).items()
    }


def _open(member: Member) -> Any:
    if member.is_stored:
        return member.mapped()
    shape, _, dtype = member.header
    return RowStream(member.where, shape, dtype, partial(_member_blocks, member))


def _member_blocks(member: Member) -> Blocks:
    with (
        open_archive(member.path) as archive,
        reading(member.where),
        archive.open(member.info) as file,
    ):
        file.seek(member.start)
        yield from _blocks(member.where, file, member.header)


def _blocks(where: str, file: Any, header: Header) -> Blocks:
    shape, fortran_order, dtype = header
    if fortran_order or not shape:
        data = _at_most(file, header.nbytes + 1)
        if len(data) != header.nbytes:
            raise FormatError(f"{where} has {len(data)} bytes of data; its shape is {shape}")
        whole = np.frombuffer(data, dtype)
        yield whole.reshape(shape, order="F")
        return
    row = prod(shape[1:]) * dtype.itemsize
    for start in range(0, shape[0], step := rows_per_block(shape)):
        count = min(step, shape[0] - start)
        data = _at_most(file, count * row)
        if len(data) != count * row:
            raise FormatError(
                f"{where} ends after {start + len(data) // max(row, 1)} of {shape[0]} rows; it is "
                "truncated"
            )
        yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _at_most(file: Any, count: int) -> bytes:
    """Read so many bytes, or those there are: a header may promise more than memory holds."""
    parts = []
    while count > 0 and (part := file.read(min(count, READ_BYTES))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
