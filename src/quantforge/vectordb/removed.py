"""Rows that are held but no longer there: they wait to be dropped together.

Taking rows out of their buffers copies all others. So a row that is removed is marked, searches
leave it out, and when MAX_SHARE of all rows are marked they are dropped at once: a row is copied
a few times in its life, however many removals there are.
"""

from __future__ import annotations

import numpy as np
import torch

MAX_SHARE = 0.25
"""Of all rows that may be marked."""


class Removed:
    """Marks of rows.

    Attributes:
        count: rows that are marked.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mask = torch.empty(0, dtype=torch.bool)
        self._bitmap: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._mask.nbytes + (0 if self._bitmap is None else self._bitmap.nbytes)

    def mark(self, rows: torch.Tensor, n: int) -> None:
        """Mark rows (m,), distinct and not marked, of n."""
        if len(self._mask) < n:
            fresh = torch.zeros(n - len(self._mask), dtype=torch.bool)
            self._mask = torch.cat([self._mask, fresh])
        self._mask[rows] = True
        self._bitmap = None
        self.count += len(rows)

    def hide(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows with -1 in the place of those that are marked."""
        if not self.count:
            return rows
        known = (rows >= 0) & (rows < len(self._mask))
        marked = self._mask[torch.where(known, rows, 0)] & known
        return torch.where(marked, -1, rows)

    def left(self, n: int) -> torch.Tensor:
        """Return the rows of n that are not marked, rising."""
        if not self.count:
            return torch.arange(n)
        late = torch.arange(len(self._mask), n)
        return torch.cat([(~self._mask).nonzero()[:, 0], late])

    def bitmap(self, n: int, device: torch.device) -> torch.Tensor | None:
        """Return bits (ceil(n / 8),) uint8 of the rows that are not marked; None if none is."""
        if not self.count:
            return None
        nbytes = -(-n // 8)
        if self._bitmap is None or len(self._bitmap) < nbytes or self._bitmap.device != device:
            there = np.ones(8 * nbytes, bool)
            there[: len(self._mask)] = ~self._mask.numpy()
            bits = torch.from_numpy(np.packbits(there, bitorder="little"))
            self._bitmap = bits.to(device)
        return self._bitmap[:nbytes]
