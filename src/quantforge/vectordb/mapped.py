"""Room behind rows that a file is mapped for, so that rows can be added without a copy of it.

A range of addresses is reserved, and the pages of the file that hold the rows are mapped to its
beginning, privately: the rows are where they were in their pages, and what is written, behind them
or over them, goes to pages of the process.

    address    | page of the file | page of the file | page of the file | nothing yet ...
                     ^ first row                          ^ the first new row

Source: mmap(2), MAP_FIXED and MAP_PRIVATE; proc(5), maps. Linux only; elsewhere rows are copied.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

MIN_BYTES = 1 << 20
"""Fewer are copied."""
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class Place:
    """Where bytes come from."""

    path: str
    inode: int
    offset: int


def place_of(rows: torch.Tensor) -> Place | None:
    """Return the place of contiguous rows in a file that is mapped; None if they are in none."""
    if not sys.platform.startswith("linux") or rows.device.type != "cpu":
        return None
    if not rows.is_contiguous() or rows.nbytes < MIN_BYTES:
        return None
    address = rows.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, inode, *path = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            if not int(inode) or not path or address + rows.nbytes > end:
                return None
            return Place(path[0], int(inode), int(offset, 16) + address - begin)
    return None


def with_room(rows: torch.Tensor, count: int) -> torch.Tensor | None:
    """Return a buffer for `count` rows that begins with these, which a file is mapped for.

    None if that cannot be: the rows are not those of a file as it is on the disk now, or a page of
    them has been written to.
    """
    place = place_of(rows)
    if place is None:
        return None
    row_bytes = rows.nbytes // len(rows)
    lead = place.offset % mmap.PAGESIZE
    size = lead + count * row_bytes
    libc = _libc()
    try:
        file = os.open(place.path, os.O_RDONLY)
    except OSError:  # its name is gone
        return None
    try:
        if os.fstat(file).st_ino != place.inode:
            return None
        access = mmap.PROT_READ | mmap.PROT_WRITE
        private = mmap.MAP_PRIVATE | MAP_NORESERVE
        begin = libc.mmap(None, size, access, private | mmap.MAP_ANONYMOUS, -1, 0)
        if begin == FAILED:
            return None
        held = lead + rows.nbytes
        found = libc.mmap(begin, held, access, private | MAP_FIXED, file, place.offset - lead)
        if found == FAILED:
            libc.munmap(begin, size)
            return None
    finally:
        os.close(file)
    memory = (ctypes.c_uint8 * (size - lead)).from_address(begin + lead)
    weakref.finalize(memory, libc.munmap, begin, size).atexit = False
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    return buffer.view(rows.dtype).view(count, *rows.shape[1:])


@lru_cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = (pointer, size, number, number, number, ctypes.c_int64)
    libc.mmap.restype = pointer
    libc.munmap.argtypes = (pointer, size)
    return libc
