"""Arrays in .npy format inside of other files: headers, and members of a .npz archive."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from os import PathLike
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np

from quantforge.errors import FormatError

LOCAL_HEADER_BYTES = 30
"""A zip member's own header, before its name and extra field."""
MEMBER_SUFFIX = ".npy"
BAD_HEADER = (ValueError, TypeError, OverflowError, SyntaxError, TokenError)
"""What numpy raises where a header is no Python literal, or of an impossible shape."""

BAD_ARCHIVE = (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError)
"""What zipfile raises for a directory that is damaged, of a later version, or misnamed."""


class Header(NamedTuple):
    """The header of an array in .npy format."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(where: str, file: Any) -> Header:
    """Read the header of an array in .npy format.

    Raises:
        FormatError: for anything else, or an array of Python objects or records.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            header = Header(*np.lib.format.read_array_header_1_0(file))
        elif version == (2, 0):
            header = Header(*np.lib.format.read_array_header_2_0(file))
        else:
            raise ValueError(f"format version {version}")
    except BAD_HEADER as error:
        raise FormatError(f"{where} is not in .npy format: {error}") from error
    if any(length < 0 for length in header.shape):
        raise FormatError(f"{where} has the impossible shape {header.shape}")
    if header.dtype.hasobject or header.dtype.fields is not None:
        raise FormatError(f"{where} holds {header.dtype}, which is not an array of numbers")
    return header


class Member(NamedTuple):
    """An array of a .npz archive."""

    where: str
    path: str
    info: zipfile.ZipInfo
    header: Header
    start: int

    @property
    def is_stored(self) -> bool:
        """Whether its bytes lie in the archive as they are, and can be mapped."""
        return self.info.compress_type == zipfile.ZIP_STORED and not self.info.flag_bits & 1

    def mapped(self) -> np.ndarray:
        """Map a stored member; writing to it changes a private copy.

        Raises:
            FormatError: if the archive is shorter than the array.
        """
        shape, fortran_order, dtype = self.header
        if self.start + self.header.nbytes > self.info.file_size:
            raise FormatError(f"{self.where} is truncated: its shape is {shape}")
        if self.header.nbytes == 0:
            return np.empty(shape, dtype)
        with open(self.path, "rb") as file:
            file.seek(self.info.header_offset)
            local = file.read(LOCAL_HEADER_BYTES)
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        offset = self.info.header_offset + LOCAL_HEADER_BYTES + names + self.start
        order: Any = "F" if fortran_order else "C"
        try:
            return np.memmap(self.path, dtype, "c", offset, shape, order)
        except (ValueError, OverflowError) as error:
            raise FormatError(f"{self.where} cannot be mapped: {error}") from error

    def read(self) -> np.ndarray:
        """Read the array; its checksum is verified.

        Raises:
            FormatError: if it is damaged.
        """
        if self.info.file_size != self.start + self.header.nbytes:
            raise FormatError(f"{self.where} is truncated: its shape is {self.header.shape}")
        with open_archive(self.path) as archive, reading(self.where):
            data = archive.read(self.info)
        order: Any = "F" if self.header.fortran_order else "C"
        numbers = np.frombuffer(data, self.header.dtype, offset=self.start)
        return numbers.reshape(self.header.shape, order=order).copy()


def open_archive(path: str | PathLike[str]) -> zipfile.ZipFile:
    """Open a .npz file.

    Raises:
        FormatError: if it is not a zip archive.
    """
    try:
        return zipfile.ZipFile(path)
    except BAD_ARCHIVE as error:
        raise FormatError(f"{path} is not a readable .npz file: {error}") from error


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Raise `FormatError` for what zipfile raises where a member is damaged."""
    try:
        yield
    except (*BAD_ARCHIVE, zlib.error, lzma.LZMAError, EOFError) as error:
        raise FormatError(f"{where} is damaged: {error}") from error


def members(path: str | PathLike[str]) -> dict[str, Member]:
    """Return the arrays of a .npz file by name.

    Raises:
        FormatError: if it is not one, or holds something else than arrays of numbers and text.
    """
    found = {}
    with open_archive(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(MEMBER_SUFFIX)
            if name == info.filename:
                continue
            where = f"{path}: array {name!r}"
            if info.flag_bits & 1:
                raise FormatError(f"{where} is encrypted; decrypt the archive first")
            with reading(where), archive.open(info) as file:
                header = read_header(where, file)
                found[name] = Member(where, str(path), info, header, file.tell())
    return found
