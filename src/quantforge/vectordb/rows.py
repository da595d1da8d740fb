"""Rows of an index: codes, offsets and originals in buffers that grow."""

from __future__ import annotations

import torch

from quantforge.vectordb.codec import Coded

GROWTH = 1.25


class Growing:
    """Rows (n, ...) of one dtype in a buffer with room for more."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._buffer, self._count = rows, len(rows)

    @property
    def rows(self) -> torch.Tensor:
        """The rows, a view."""
        return self._buffer[: self._count]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, spare room included."""
        return self._buffer.nbytes

    def append(self, rows: torch.Tensor) -> None:
        """Add rows at the end."""
        count = self._count + len(rows)
        if count > len(self._buffer):
            room = max(count, int(GROWTH * self._count))
            bigger = self._buffer.new_empty((room, *self._buffer.shape[1:]))
            bigger[: self._count] = self.rows
            self._buffer = bigger
        self._buffer[self._count : count] = rows
        self._count = count

    def put(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Overwrite rows; a buffer that is a file's stays as it is there."""
        self._buffer[index] = rows

    def keep(self, index: torch.Tensor) -> None:
        """Keep these rows alone, without spare room."""
        self._buffer = self.rows[index]
        self._count = len(index)


class Rows:
    """All that an index holds of its vectors, row by row."""

    def __init__(self, coded: Coded, ids: torch.Tensor, originals: torch.Tensor | None) -> None:
        self._packed = [Growing(part) for part in coded.packed]
        self._scales, self._offsets = Growing(coded.scales), Growing(coded.offsets)
        self._ids = Growing(ids)
        self._originals = None if originals is None else Growing(originals)

    def _all(self) -> list[Growing]:
        kept = [] if self._originals is None else [self._originals]
        return [*self._packed, self._scales, self._offsets, self._ids, *kept]

    def __len__(self) -> int:
        return len(self._ids.rows)

    @property
    def ids(self) -> torch.Tensor:
        """Ids (n,) int64, in the order of rows."""
        return self._ids.rows

    @property
    def originals(self) -> torch.Tensor | None:
        """Original vectors (n, dim) fp16, if they are kept."""
        return None if self._originals is None else self._originals.rows

    def coded(self, index: slice | torch.Tensor) -> Coded:
        """Return the codes of some rows."""
        packed = tuple(part.rows[index] for part in self._packed)
        return Coded(packed, self._scales.rows[index], self._offsets.rows[index])

    def report(self) -> dict[str, int]:
        """Return the bytes held by part."""
        return {
            "codes": sum(part.nbytes for part in self._packed),
            "scales": self._scales.nbytes + self._offsets.nbytes,
            "ids": self._ids.nbytes,
            "originals": 0 if self._originals is None else self._originals.nbytes,
        }

    def append(self, coded: Coded, ids: torch.Tensor, originals: torch.Tensor | None) -> None:
        """Add rows."""
        parts = [*coded.packed, coded.scales, coded.offsets, ids]
        parts += [] if originals is None else [originals]
        for part, rows in zip(self._all(), parts, strict=True):
            part.append(rows)

    def put(self, index: torch.Tensor, coded: Coded, originals: torch.Tensor | None) -> None:
        """Overwrite the vectors of rows; their ids stay."""
        parts = [*coded.packed, coded.scales, coded.offsets, self.ids[index]]
        parts += [] if originals is None else [originals]
        for part, rows in zip(self._all(), parts, strict=True):
            part.put(index, rows)

    def keep(self, index: torch.Tensor) -> None:
        """Keep these rows alone."""
        for part in self._all():
            part.keep(index)
