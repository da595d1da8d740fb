"""What rows may have beyond their loud directions: it lets a search leave most of them early.

The operator `mixed_search` multiplies the leading groups of codes for every row. What the others
can add is bounded by a length that is known of each row, 2 bytes; these lengths follow their rows
and are made when a search first wants them, so no file holds them.
"""

from __future__ import annotations

import torch

from quantforge.ops.mixed_search.parts import Bounds, rests_of
from quantforge.vectordb.codec import Codec
from quantforge.vectordb.rows import Growing, Rows

MAX_REST = 0.25
"""Share of the variance that the groups behind the leading ones may have."""
MIN_ROWS = 1024
"""Fewer rows are searched before their lengths are known."""


class RowBounds:
    """Bounds of rows.

    Args:
        codec: of the rows.
    """

    def __init__(self, codec: Codec) -> None:
        self._specs = tuple(spec for spec, _ in codec.groups)
        where = [part for _, part in codec.groups]
        step = torch.from_numpy(codec.code.step).to(torch.float32)
        share = step.square() / step.square().sum()
        rests = [float(share[part.stop : where[-1].stop].sum()) for part in where]
        self._lead = next(i for i, rest in enumerate(rests, 1) if rest <= MAX_REST)
        self._steps = torch.cat([step[part] for part in where])
        if self._lead < len(where):
            self._steps = self._steps / step[where[self._lead].start : where[-1].stop].max()
        self._rests = Growing(torch.empty(0, dtype=torch.float16))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._rests.nbytes + self._steps.nbytes

    def of(self, rows: Rows) -> Bounds | None:
        """Return the bounds of all rows; None where there is nothing to leave out."""
        if self._lead == len(self._specs) or len(rows) < MIN_ROWS:
            return None
        self._complete(rows)
        return Bounds(self._lead, self._steps, self._rests.rows)

    def keep(self, rows: Rows, index: torch.Tensor) -> None:
        """Follow rows that are about to be rearranged."""
        if len(self._rests.rows):
            self._complete(rows)
            self._rests.keep(index)

    def put(self, rows: Rows, index: torch.Tensor) -> None:
        """Follow rows that have been overwritten."""
        index = index[index < len(self._rests.rows)]
        if len(index):
            self._rests.put(index, self._measure(rows, index))

    def _complete(self, rows: Rows) -> None:
        known = len(self._rests.rows)
        if known < len(rows):
            self._rests.append(self._measure(rows, slice(known, len(rows))))

    def _measure(self, rows: Rows, index: slice | torch.Tensor) -> torch.Tensor:
        return rests_of(rows.coded(index).packed, self._specs, self._steps, self._lead)
