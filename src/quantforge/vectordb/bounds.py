"""What searches make of rows: bounds beyond loud directions, and calls that are ready.

The operator `mixed_search` multiplies the leading groups of codes for every row. What the others
can add is bounded by a length that is known of each row, 2 bytes; these lengths follow their rows
and are made when a search first wants them, so no file holds them. So most rows are left
early. A search of all rows by the native library is prepared once, until rows change.
"""

from __future__ import annotations

import torch

from quantforge.ops.mixed_search.native import PreparedSearch
from quantforge.ops.mixed_search.parts import Bounds, rests_of
from quantforge.vectordb.codec import Codec
from quantforge.vectordb.rows import Growing, Rows
from quantforge.vectordb.two_stage import Plan

MAX_REST = 0.25
"""Share of the variance that the groups behind the leading ones may have."""
MIN_ROWS = 1024
"""Fewer rows are searched before their lengths are known."""
LEAST_MARGIN = 1e-3
"""Standard deviations: a margin of none would make rows out of reach by rounding."""

Searches = dict[tuple[int | None, float] | None, tuple[PreparedSearch, Bounds | None]]


class Ready:
    """Searches that are prepared, by (lead, margin) or None, with bounds of their own.

    They hold addresses of the rows, so a copy or pickle of an index begins without any.
    """

    def __init__(self) -> None:
        self._rows = 0
        self.searches: Searches = {}

    def __reduce__(self) -> tuple[type[Ready], tuple[()]]:
        return Ready, ()

    def of(self, rows: int) -> Searches:
        """Return the searches of so many rows; those of fewer are forgotten."""
        if self._rows != rows:
            self._rows, self.searches = rows, {}
        return self.searches

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        own = [bounds for _, bounds in self.searches.values() if bounds is not None]
        return sum(bounds.steps.nbytes + bounds.rests.nbytes for bounds in own)


class RowBounds:
    """Bounds of rows, and searches of all of them.

    Args:
        codec: of the rows.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
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
        self._ready = Ready()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._rests.nbytes + self._steps.nbytes + self._ready.nbytes

    def of(self, rows: Rows) -> Bounds | None:
        """Return the bounds of all rows; None where there is nothing to leave out."""
        if self._lead == len(self._specs) or len(rows) < MIN_ROWS:
            return None
        self._complete(rows)
        return Bounds(self._lead, self._steps, self._rests.rows)

    def search(self, rows: Rows, plan: Plan | None = None) -> PreparedSearch | None:
        """Return the search of all rows; None where the native library cannot run it.

        Args:
            rows: the rows.
            plan: bounds by its margin, instead of those that lose nothing; its stage reads whole
                groups.
        """
        key = None if plan is None else (plan.stage.lead, plan.z)
        ready = self._ready.of(len(rows)).get(key)
        if ready is None:
            if PreparedSearch.cannot(self._specs, self._codec.device) is not None:
                return None
            bounds = self.of(rows) if plan is None else self._by_margin(rows, plan)
            coded = rows.coded(slice(None))
            search = PreparedSearch(
                coded.packed,
                self._specs,
                coded.scales,
                coded.offsets,
                unit=self._codec.unit,
                bounds=bounds,
                held=None if plan is None else bounds,  # another thread may replace what is ready
            )
            ready = self._ready.searches[key] = search, None if plan is None else bounds
        return ready[0]

    def _by_margin(self, rows: Rows, plan: Plan) -> Bounds:
        """Return bounds `z sigma`, which are |query / steps| times the scale of a row."""
        steps = torch.ones_like(self._steps)
        for (_, where), variance in zip(self._codec.groups, plan.stage.unseen, strict=True):
            if variance:
                steps[where] = 1 / (max(plan.z, LEAST_MARGIN) * variance**0.5)
        assert plan.stage.lead is not None, "a plan of whole groups"
        return Bounds(plan.stage.lead, steps, torch.ones(len(rows), dtype=torch.float16))

    def keep(self, rows: Rows, index: torch.Tensor) -> None:
        """Follow rows that are about to be rearranged."""
        self._ready = Ready()
        if len(self._rests.rows):
            self._complete(rows)
            self._rests.keep(index)

    def put(self, rows: Rows, index: torch.Tensor) -> None:
        """Follow rows that have been overwritten."""
        self._ready = Ready()
        index = index[index < len(self._rests.rows)]
        if len(index):
            self._rests.put(index, self._measure(rows, index))

    def _complete(self, rows: Rows) -> None:
        known = len(self._rests.rows)
        if known < len(rows):
            self._rests.append(self._measure(rows, slice(known, len(rows))))

    def _measure(self, rows: Rows, index: slice | torch.Tensor) -> torch.Tensor:
        return rests_of(rows.coded(index).packed, self._specs, self._steps, self._lead)
