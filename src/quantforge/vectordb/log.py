"""An append-only file of records, each on the disk before `append` returns.

    file    magic 8 | version u32 | token u32 | crc32 u32 of these 16 | 12 zeros
    record  magic 4 | crc32 u32 of the next 24 bytes, started at the token | number u64
            | payload bytes u64 | crc32 u32 of the payload | 4 zeros | payload

Little-endian. Numbers count from 0. A record is written only when the one before it is on the
disk. So an invalid record with no other after it is one that a crash cut short: it was never
acknowledged, and the next writer removes it. An invalid record before another one is damage. The
token is random: records that lie in a file by accident do not count.
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from quantforge.errors import FormatError, InputError
from quantforge.io.atomic import replacing

logger = logging.getLogger(__name__)

VERSION = 1
FILE_MAGIC, RECORD_MAGIC = b"QFRECORD", b"QFre"
FILE_HEADER = struct.Struct("<8sIII12x")
RECORD_HEADER = struct.Struct("<4sIQQI4x")
UNCHECKED = 8
"""Bytes of a record's header before those that its checksum covers."""
PIECE = 1 << 24


class Log:
    """The records of one file, read in order, then appended to.

    Args:
        path: of a file that `Log.create` made.
        writable: whether records may be appended; one such object at a time.

    Raises:
        FormatError: for a missing file, another kind of file, or another version.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        try:
            self._file = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise FormatError(f"{path} is missing; restore it from a copy of its folder") from error
        try:
            self._token = self._read_file_header()
        except BaseException:
            self.close()
            raise
        self._end, self._count = FILE_HEADER.size, 0
        self._last = b""
        self._broken = False

    @staticmethod
    def create(path: Path) -> None:
        """Write a log without records."""
        head = FILE_HEADER.pack(FILE_MAGIC, VERSION, secrets.randbits(32), 0)
        checked = struct.pack("<I", zlib.crc32(head[:16]))
        with replacing(path) as file:
            file.write(head[:16] + checked + head[20:])

    def _read_file_header(self) -> int:
        head = os.pread(self._file, FILE_HEADER.size, 0)
        if len(head) < FILE_HEADER.size or head[:8] != FILE_MAGIC:
            raise FormatError(f"{self.path} is not a log, or cut within its first 32 bytes")
        _, version, token, crc = FILE_HEADER.unpack(head)
        if crc != zlib.crc32(head[:16]):
            raise FormatError(f"{self.path}: the first 32 bytes are damaged")
        if version != VERSION:
            raise FormatError(
                f"{self.path} is a log of version {version}; this quantforge reads {VERSION}"
            )
        return int(token)

    @property
    def nbytes(self) -> int:
        """Bytes up to the end of the last record that was read or appended."""
        return self._end

    def records(self) -> Iterator[bytes]:
        """Yield the payloads that have not been read yet.

        Raises:
            FormatError: for damage, at the offset that it names.
        """
        while (record := self._read(self._end)) is not None:
            head, payload = record
            self._end += len(head) + len(payload)
            self._count += 1
            self._last = head
            yield payload

    def _read(self, offset: int) -> tuple[bytes, bytes] | None:
        """Return header and payload of the next record, or None where no whole one follows."""
        record = self._valid(offset)
        if record is None and (later := self._find_header(offset + 1)) is not None:
            # it may have been half written at the first look; with another behind it, no more
            record = self._valid(offset)
            if record is None:
                raise FormatError(
                    f"{self.path}: the record at byte {offset} is damaged (a valid one follows at "
                    f"byte {later}); restore the file from a copy of its folder"
                )
        return record

    def _valid(self, offset: int) -> tuple[bytes, bytes] | None:
        head = os.pread(self._file, RECORD_HEADER.size, offset)
        if not self._is_header(head, self._count):
            return None
        *_, nbytes, crc = RECORD_HEADER.unpack(head)
        if offset + len(head) + nbytes > os.fstat(self._file).st_size:
            return None
        payload = _read_all(self._file, offset + len(head), nbytes)
        return (head, payload) if zlib.crc32(payload) == crc else None

    def _is_header(self, head: bytes, least: int) -> bool:
        if len(head) < RECORD_HEADER.size or head[:4] != RECORD_MAGIC:
            return False
        _, crc, number, _, _ = RECORD_HEADER.unpack(head)
        return bool(number >= least and crc == zlib.crc32(head[UNCHECKED:], self._token))

    def _find_header(self, start: int) -> int | None:
        size = os.fstat(self._file).st_size
        for at in range(start, size, PIECE):
            piece = _read_all(self._file, at, min(PIECE + RECORD_HEADER.size - 1, size - at))
            found = piece.find(RECORD_MAGIC)
            while found >= 0:
                if self._is_header(piece[found : found + RECORD_HEADER.size], self._count + 1):
                    return at + found
                found = piece.find(RECORD_MAGIC, found + 1)
        return None

    def is_continued(self) -> bool:
        """Return whether the last record that was read is still there.

        It is not if the disk refused it after it had been read: its writer took it back.
        """
        if not self._last:
            return True
        start = self._end - RECORD_HEADER.size - RECORD_HEADER.unpack(self._last)[3]
        return os.pread(self._file, RECORD_HEADER.size, start) == self._last

    def cut(self) -> None:
        """Remove what follows the last record: a write that a crash cut short."""
        extra = os.fstat(self._file).st_size - self._end
        if extra > 0:
            logger.warning(
                "%s: cut %d bytes at byte %d, left by a commit that did not end",
                *(self.path, extra, self._end),
            )
            self._truncate()

    def _truncate(self) -> None:
        os.ftruncate(self._file, self._end)
        os.fsync(self._file)

    def append(self, payload: bytes) -> None:
        """Write a record and wait until it is on the disk.

        Raises:
            OSError: if the disk is full or fails; the log is as it was.
            InputError: if it could not be left as it was.
        """
        if self._broken:
            raise InputError(f"{self.path} could not be written to; close the store and open it")
        body = struct.pack("<QQI4x", self._count, len(payload), zlib.crc32(payload))
        head = RECORD_MAGIC + struct.pack("<I", zlib.crc32(body, self._token)) + body
        try:
            _write_all(self._file, head, self._end)
            _write_all(self._file, payload, self._end + len(head))
            os.fsync(self._file)
        except BaseException as error:
            self._take_back()
            if isinstance(error, OSError):
                raise OSError(
                    error.errno,
                    f"{error.strerror}: {len(head) + len(payload)} bytes could not be written, "
                    "nothing was changed; make room and try again",
                    str(self.path),
                ) from error
            raise
        self._end += len(head) + len(payload)
        self._count += 1
        self._last = head

    def _take_back(self) -> None:
        try:
            self._truncate()
        except OSError:
            self._broken = True
            logger.exception("%s: a record that failed could not be taken back", self.path)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _read_all(file: int, offset: int, count: int) -> bytes:
    parts = []
    while count > 0:
        part = os.pread(file, min(count, 1 << 30), offset)
        if not part:
            break
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write_all(file: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest[: 1 << 30], offset)
        rest, offset = rest[written:], offset + written
