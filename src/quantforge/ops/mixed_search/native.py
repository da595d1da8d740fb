"""Mixed search on the CPU by the native library: one call for all groups, rows and queries."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from quantforge.native.integers import IntegerGroup, SearchCall, integer_group, table_bytes
from quantforge.ops.mixed_search.eager import output_like
from quantforge.ops.mixed_search.parts import Bounds, Visits
from quantforge.ops.native_call import cannot_run, loaded, unit_stride
from quantforge.spec import QuantSpec


def supports(
    query: torch.Tensor,
    packed: list[torch.Tensor],
    scales: torch.Tensor,
    offsets: torch.Tensor,
    base: torch.Tensor,
    rests: torch.Tensor | None,
    steps: torch.Tensor | None,
    ranges: torch.Tensor,
    starts: torch.Tensor,
    visitors: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    lead: int,
    unit: float,
    specs: list[str],
) -> str | None:
    """Return why the arguments are not for this backend, or None."""
    return cannot_run(*(QuantSpec.from_key(key) for key in specs), device=query.device)


def mixed_search(
    query: torch.Tensor,
    packed: list[torch.Tensor],
    scales: torch.Tensor,
    offsets: torch.Tensor,
    base: torch.Tensor,
    rests: torch.Tensor | None,
    steps: torch.Tensor | None,
    ranges: torch.Tensor,
    starts: torch.Tensor,
    visitors: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    lead: int,
    unit: float,
    specs: list[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::mixed_search` on the CPU."""
    parsed = tuple(QuantSpec.from_key(key) for key in specs)
    bounds = None
    if rests is not None and steps is not None:
        bounds = Bounds(lead, steps, rests)
    codes = _Codes.of(tuple(packed), parsed, scales, offsets, unit, bounds)
    given = {
        "bitmap": filter_bitmap,
        "range": ranges,
        "visits": starts,
        "visitors": visitors,
    }
    held = {name: t.contiguous() for name, t in given.items() if t is not None}
    where = {name: t.data_ptr() for name, t in held.items()}
    return codes.search(query.contiguous(), base.contiguous(), k, ranges=len(ranges), **where)


class PreparedSearch:
    """A search of all rows of codes, checked once: a query costs one call and no operator.

    Finds what `mixed_search` finds.

    Args:
        packed: per group (n, row_bytes) uint8. Whoever asks keeps all tensors alive and in place.
        specs: per group.
        scales: (n, 1) float16.
        offsets: (n,) float16.
        unit: of offsets.
        bounds: lets the kernel skip rows; changes no result.
        held: is kept alive as long as this.
    """

    def __init__(
        self,
        packed: tuple[torch.Tensor, ...],
        specs: tuple[QuantSpec, ...],
        scales: torch.Tensor,
        offsets: torch.Tensor,
        *,
        unit: float,
        bounds: Bounds | None,
        held: object = None,
    ) -> None:
        self._held = held
        self._codes = _Codes.of(packed, specs, scales, offsets, unit, bounds)
        self._range = (ctypes.c_int64 * 2)(0, len(offsets))
        self._codes.call.range = ctypes.addressof(self._range)
        self._codes.call.ranges = 1

    @classmethod
    def cannot(cls, specs: tuple[QuantSpec, ...], device: torch.device) -> str | None:
        """Return why there is none for codes of these specs on a device, or None."""
        return cannot_run(*specs, device=device)

    def __call__(
        self,
        query: torch.Tensor,
        base: torch.Tensor,
        k: int,
        filter_bitmap: torch.Tensor | None = None,
        visits: Visits | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k best scores (q, k), falling, and their rows; -inf and -1 for none.

        Args:
            query: (q, dim) float32, on the CPU.
            base: float32, added to the scores of each query (q,), or in each visit.
            k: at least 1.
            filter_bitmap: (ceil(n / 8),) uint8 of the rows that may be found; None for all.
            visits: which rows each query looks at, on the CPU; None for all.
        """
        given: dict[str, int | None] = {}
        if filter_bitmap is not None:
            given["bitmap"] = filter_bitmap.data_ptr()
        if visits is None:
            every = (ctypes.c_int64 * 2)(0, len(query))
            given["visits"] = ctypes.addressof(every)
            return self._codes.search(query.contiguous(), base.contiguous(), k, **given)
        parts = [t.contiguous() for t in (visits.ranges, visits.starts, visits.queries)]
        for name, t in zip(("range", "visits", "visitors"), parts, strict=True):
            given[name] = t.data_ptr()
        given["ranges"] = len(visits.ranges)
        return self._codes.search(query.contiguous(), base.contiguous(), k, **given)


@dataclass(frozen=True, eq=False)
class _Codes:
    """What does not depend on the query, in the C structure of a call, and what was made for it."""

    call: SearchCall
    held: tuple[object, ...]

    @classmethod
    def of(
        cls,
        packed: tuple[torch.Tensor, ...],
        specs: tuple[QuantSpec, ...],
        scales: torch.Tensor,
        offsets: torch.Tensor,
        unit: float,
        bounds: Bounds | None,
    ) -> _Codes:
        rows = [unit_stride(part) for part in packed]
        groups = (IntegerGroup * len(specs))(
            *(
                integer_group(spec, part.data_ptr(), part.stride(0))
                for spec, part in zip(specs, rows, strict=True)
            )
        )
        given = {"scales": scales, "offsets": offsets}
        if bounds is not None:
            given |= {"rests": bounds.rests, "steps": bounds.steps}
        held = {name: t.contiguous() for name, t in given.items()}
        own_tensors = (*packed, *given.values())
        call = SearchCall(
            groups=groups,
            count=len(specs),
            lead=len(specs) if bounds is None else bounds.lead,
            unit=unit,
            rows=rows[0].shape[0],
            **{name: t.data_ptr() for name, t in held.items()},
        )
        made = [t for t in (*rows, *held.values()) if not any(t is own for own in own_tensors)]
        return cls(call, (groups, made, [table_bytes(spec) for spec in specs]))

    def search(
        self, query: torch.Tensor, base: torch.Tensor, k: int, **given: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Search with further fields of the structure; several threads may do so at once."""
        scores, found = output_like(query, k)
        call = SearchCall.from_buffer_copy(self.call)
        call.threads = torch.get_num_threads()
        call.queries, call.k = query.shape[0], k
        call.query, call.base = query.data_ptr(), base.data_ptr()
        call.scores, call.found = scores.data_ptr(), found.data_ptr()
        for name, value in given.items():
            setattr(call, name, value)
        loaded().call("qf_search", ctypes.byref(call))
        return scores, found
