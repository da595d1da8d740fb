"""One writer of a folder at a time; the lock ends with the process that holds it."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from quantforge.errors import InputError, UnsupportedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


class WriterLock:
    """The right to write to a folder, held from now until `release` or the end of the process.

    Args:
        path: of a file that is made for this and stays; it holds the process id of the last owner.

    Raises:
        InputError: if another process, or another object of this one, holds it.
        UnsupportedError: where files cannot be locked.
    """

    def __init__(self, path: Path) -> None:
        if fcntl is None:
            raise UnsupportedError(
                f"{path.parent} cannot be locked: this platform has no fcntl; open the store with "
                "read_only=True"
            )
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(file, 20, 0).decode("ascii", "replace").strip()
            os.close(file)
            raise InputError(
                f"{path.parent} is open for writing in process {owner or 'unknown'}; close it "
                "there, or open it here with read_only=True"
            ) from error
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
        except OSError:
            os.close(file)
            raise
        self._file = file
        _held.add(self)

    @property
    def is_held(self) -> bool:
        """Whether this process may write; a fork of it may not."""
        return self._file >= 0

    def release(self) -> None:
        """Let others write."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.release()


def _let_go_in_child() -> None:
    """Close the copies that a fork made: with one open, the lock would outlive its owner."""
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
