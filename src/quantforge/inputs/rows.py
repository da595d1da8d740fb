"""Arrays that are read from start to end, and arrays read as another dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np

from quantforge.errors import FormatError, InputError

BLOCK_NUMBERS = 1 << 20
"""Numbers read at a time: 4 MiB of float32."""

Blocks = Iterator[np.ndarray]


def rows_per_block(shape: tuple[int, ...]) -> int:
    """Return how many rows of an array are read at a time."""
    return max(1, BLOCK_NUMBERS // max(1, prod(shape[1:])))


class RowStream:
    """An array whose rows come in blocks; asking for rows before the last block begins again.

    Args:
        where: what is read, for messages.
        shape: (n, ...).
        dtype: of the numbers.
        read: begins to read and returns an iterator of arrays (m, ...), n rows in all.
        once: `read` may be called only once; rows from the start of the last slice on stay.
    """

    def __init__(
        self,
        where: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        read: Callable[[], Blocks],
        *,
        once: bool = False,
    ) -> None:
        self.shape, self.dtype, self.ndim = shape, dtype, len(shape)
        self._where, self._read, self.once = where, read, once
        self._blocks: Blocks | None = None
        self._first, self._held = 0, np.empty((0, *shape[1:]), dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return rows: a slice, a row number, or a tuple that begins with one."""
        if isinstance(index, tuple):
            return self[index[0]][index[1:]]
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._rows(start, max(start, stop))[::step]
        return self._rows(index, index + 1)[0]

    def _rows(self, start: int, stop: int) -> np.ndarray:
        if self._blocks is None or start < self._first:
            self._begin()
        assert self._blocks is not None
        while stop > self._first + len(self._held):
            block = next(self._blocks, None)
            if block is None:
                raise FormatError(
                    f"{self._where} ends after {self._first + len(self._held)} of "
                    f"{len(self)} rows; it is truncated"
                )
            passed = min(start - self._first, len(self._held))
            kept = self._held[passed:]
            self._held = np.concatenate([kept, block]) if len(kept) else block
            self._first += passed
        return self._held[start - self._first : stop - self._first]

    def _begin(self) -> None:
        if self._blocks is not None and self.once:
            raise InputError(
                f"{self._where} can be read only once, and this needs a second pass; save it to a "
                "file first"
            )
        self._blocks = self._read()
        self._first, self._held = 0, self._held[:0]


class AsFloat32:
    """An array of small integers, read as float32."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.ndim, self.dtype = len(self.shape), np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        part = self._array[index]
        return np.asarray(part).astype(np.float32)
