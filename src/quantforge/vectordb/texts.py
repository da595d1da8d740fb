"""Strings by row: UTF-8 in one buffer, and where each ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quantforge.errors import FormatError
from quantforge.vectordb.rows import Growing

CHUNK_ROWS = 1 << 16


class Texts:
    """Strings (n,), 8 bytes each and their UTF-8.

    Args:
        data: (bytes,) uint8, all strings without gaps.
        ends: (n,) int64, where each of them ends.
    """

    def __init__(self, data: torch.Tensor | None = None, ends: torch.Tensor | None = None) -> None:
        self._data = Growing(torch.empty(0, dtype=torch.uint8) if data is None else data)
        self._ends = Growing(torch.empty(0, dtype=torch.int64) if ends is None else ends)

    def __len__(self) -> int:
        return len(self._ends.rows)

    @property
    def data(self) -> torch.Tensor:
        """UTF-8 of all strings, (bytes,) uint8."""
        return self._data.rows

    @property
    def ends(self) -> torch.Tensor:
        """Where each string ends, (n,) int64."""
        return self._ends.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, spare room included."""
        return self._data.nbytes + self._ends.nbytes

    def append(self, encoded: Sequence[bytes]) -> None:
        """Add strings that are UTF-8 already."""
        if not encoded:
            return
        sizes = torch.tensor([len(text) for text in encoded], dtype=torch.int64)
        joined = np.frombuffer(b"".join(encoded), np.uint8).copy()
        start = len(self._data.rows)
        self._data.append(torch.from_numpy(joined))
        self._ends.append(start + sizes.cumsum(0))

    def at(self, rows: torch.Tensor) -> list[str]:
        """Return the strings of rows (m,)."""
        starts, stops = self._spans(rows)
        data = self.data.numpy()
        try:
            return [data[i:j].tobytes().decode() for i, j in zip(starts, stops, strict=True)]
        except UnicodeDecodeError as error:  # a large file is not read when it is opened
            raise FormatError(
                f"a stored string is not UTF-8: {error}; the file is damaged"
            ) from error

    def keep(self, index: torch.Tensor) -> None:
        """Keep these rows alone, in this order."""
        parts, sizes = [], []
        for chunk in index.split(CHUNK_ROWS):
            starts, stops = self._spans(chunk)
            size = stops - starts
            within = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size)
            parts.append(self.data.numpy()[np.repeat(starts, size) + within])
            sizes.append(size)
        data = np.concatenate(parts) if parts else np.empty(0, np.uint8)
        ends = np.concatenate(sizes).cumsum() if sizes else np.empty(0, np.int64)
        self._data = Growing(torch.from_numpy(data))
        self._ends = Growing(torch.from_numpy(ends))

    def _spans(self, rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        ends, index = self.ends.numpy(), rows.cpu().numpy()
        if not len(index):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.where(index > 0, ends[index - 1], 0), ends[index]
