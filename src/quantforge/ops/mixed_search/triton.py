"""Mixed search by fused kernels: scan, select, rescore, select; all ranges in one launch.

    scan      products of rows with the queries that look at them; of each run of RUN rows only the
              best score is written, for each visit
    select    the k best runs of each query                         `ops.kernels.select`
    rescore   the rows of these runs, as (score, row)
    select    the k best rows

The k best rows lie in the k best runs: a row outside of them has k rows before it, also among
equals, because runs are in the order of rows. Both passes multiply integers, so their scores are
those of every backend, bit for bit: float32 holds sums below 2^24 of fp16 products, whatever their
order, and integers up to 2048 are exact in fp16. Wide integers of a query are two digits, whose
sums become int32 after each tile. A program is one run of one range and up to QUERIES visits; a
grid has as many runs for each range as the longest one, and those behind the end return at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton

from quantforge.numerics.integers import integer_table, is_wide
from quantforge.numerics.packing import planes, row_bytes
from quantforge.ops.constants import cached_constant
from quantforge.ops.kernels.mixed import Group, rescore_runs, scan_runs
from quantforge.ops.kernels.select import best_of_keys, best_of_scores
from quantforge.ops.launch import INTERPRET, cannot_run_on
from quantforge.ops.mixed_search.eager import EXACT_FLOAT32, query_integers, rows_of_keys
from quantforge.ops.mixed_search.parts import slices
from quantforge.spec import QuantSpec

MAX_K = 200
ROWS = 16 if INTERPRET else 64
RESCORED = 16
"""Rows that a program of one warp scores again. With four warps the sums of a second group came out
wrong (Triton 3.6 on an H200, 2026-11-25), with one they are right."""
LONG_RUN, LONG_RANGE = 4 * ROWS, 1 << 16
"""Rows of a run, where a range has more rows than LONG_RANGE; ROWS otherwise."""
DIGIT = 64
"""Of wide integers: the lower digit is from -32 to 32."""
MAX_RUN_SCORES = 1 << 28
"""Scores of runs held at once, 1 GiB: more queries that look at all rows are searched in parts."""


@lru_cache
def _layout(specs: tuple[QuantSpec, ...]) -> tuple[tuple[Group, ...], int]:
    """Return how kernels see the groups, and how many integers a query has."""
    groups, start = [], 0
    for spec in specs:
        parts = planes(spec.dim, spec.bits)
        base, wide = parts[0], is_wide(spec.bits)
        tile = 16 if base.stride <= 16 else 32
        tiles = -(-base.stride // tile)
        size = base.fields * tiles * tile
        fields = tuple((p.width, p.shift, p.offset, p.stride) for p in parts)
        row = row_bytes(spec.dim, spec.bits)
        groups.append(
            Group(row, spec.dim, base.stride, tile, tiles, base.fields, start, size, wide, fields)
        )
        start += size * (2 if wide else 1)
    return tuple(groups), start


@cached_constant
def _order(spec: QuantSpec, device: torch.device) -> torch.Tensor:
    """Return the channel at each place of a group of integers, dim where there is none."""
    group = _layout((spec,))[0][0]
    j = np.arange(group.tiles * group.tile)
    channel = np.arange(group.parts)[:, None] * group.stride + j
    channel = np.where((j < group.stride) & (channel < group.dim), channel, group.dim)
    return torch.from_numpy(channel.flatten()).to(device)


@cached_constant
def _table(spec: QuantSpec, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(integer_table(spec).values.astype(np.float16)).to(device)


def _integers(
    query: torch.Tensor, specs: tuple[QuantSpec, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries as kernels read them, (q, integers) fp16, and weights (q, groups)."""
    found, weights = [], []
    for spec, where in zip(specs, slices(specs), strict=True):
        z, unit = query_integers(query[:, where], spec)
        z = torch.nn.functional.pad(z, (0, 1))[:, _order(spec, query.device)]
        if is_wide(spec.bits):
            high = (z / DIGIT).round()
            found.append(high)
            z = z - DIGIT * high
        found.append(z)
        weights.append(unit * float(integer_table(spec).unit))
    return torch.cat(found, 1).to(torch.float16), torch.stack(weights, 1)


@dataclass(frozen=True, eq=False)
class _Work:
    """What is scanned.

    Attributes:
        entries: (e, 4) int64: rows from, to, visits from, to.
        visitors: (v,) int64, the query of each visit.
        places: (v,) int64, where the scores of its runs begin; behind all for an empty range.
        runs: of the longest range.
        slots: scores of runs of a query.
    """

    entries: torch.Tensor
    visitors: torch.Tensor
    places: torch.Tensor
    runs: int
    slots: int


def _work(
    ranges: torch.Tensor,
    starts: torch.Tensor,
    visitors: torch.Tensor | None,
    q: int,
    run: int,
    width: int,
    device: torch.device,
) -> _Work:
    """Spread visits over entries of at most `width`, and runs over the scores of each query."""
    who = np.arange(q) if visitors is None else visitors.cpu().numpy()
    bounds, begin = ranges.numpy(), starts.numpy()
    runs = -(-np.maximum(bounds[:, 1] - bounds[:, 0], 0) // run)
    visits = np.diff(begin)
    taken = np.where(runs > 0, -(-visits // width), 0)
    which = np.repeat(np.arange(len(bounds)), taken)
    within = np.arange(len(which)) - np.repeat(np.cumsum(taken) - taken, taken)
    first = begin[which] + within * width
    stop = np.minimum(first + width, begin[which + 1])
    entries = np.stack([bounds[which, 0], bounds[which, 1], first, stop], 1)
    owner = np.repeat(np.arange(len(bounds)), visits)  # the range of each visit
    order = np.lexsort((bounds[owner, 0], who))  # of equal scores the first rows are found
    size = runs[owner][order]
    before = np.cumsum(size) - size
    new = np.r_[True, who[order][1:] != who[order][:-1]]
    inside = before - np.repeat(before[new], np.diff(np.r_[np.flatnonzero(new), len(order)]))
    per_query = np.bincount(who, runs[owner], q)
    slots = max(1, int(per_query.max(initial=0)))
    places = np.empty(len(who), np.int64)
    places[order] = np.where(size > 0, who[order] * slots + inside, q * slots)
    sent, owners, begins = (
        torch.from_numpy(np.ascontiguousarray(part, np.int64)).to(device)
        for part in (entries, who, places)
    )
    return _Work(sent, owners, begins, int(runs.max(initial=0)), slots)


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
    """Return why these arguments are not for the kernels, or None."""
    if k > MAX_K:
        return f"k = {k} is more than {MAX_K}"
    for spec in map(QuantSpec.from_key, specs):
        table = integer_table(spec)
        if not is_wide(spec.bits) and table.bias * table.most * spec.dim >= EXACT_FLOAT32:
            return f"sums of {spec.dim} products may be inexact in float32"
    if not all(part.is_contiguous() for part in (*packed, scales, offsets, base)):
        return "rows are not contiguous"
    return cannot_run_on(query.device)


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
    """Implement `quantforge::mixed_search`; rows that bounds would leave out are scored."""
    q, device = len(query), query.device
    longest = int((ranges[:, 1] - ranges[:, 0]).max()) if len(ranges) else 0
    run = LONG_RUN if longest > LONG_RANGE else ROWS
    step = max(1, MAX_RUN_SCORES * run // max(1, longest))
    if visitors is None and len(ranges) == 1 and q > step:
        parts = [
            mixed_search(
                query[i : i + step], packed, scales, offsets, base[i : i + step], None, None,
                ranges, torch.tensor([0, min(step, q - i)]), None, filter_bitmap, k, lead, unit,
                specs,
            )
            for i in range(0, q, step)
        ]  # fmt: skip
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    width = 64 if len(base) > 16 * max(1, len(ranges)) else 16
    work = _work(ranges, starts, visitors, q, run, width, device) if len(base) and q else None
    if work is None or not work.runs or not len(work.entries):
        absent = torch.full((q, k), -torch.inf, device=device)
        return absent, torch.full((q, k), -1, dtype=torch.int64, device=device)
    parsed = tuple(QuantSpec.from_key(key) for key in specs)
    groups, length = _layout(parsed)
    integers, weights = _integers(query, parsed)
    tables = tuple(_table(spec, device) for spec in parsed)
    bitmap = offsets if filter_bitmap is None else filter_bitmap
    options = {"GROUPS": groups, "RUN": run, "BITMAP": filter_bitmap is not None}
    rows = (tuple(packed), tables, scales, offsets, integers, weights)
    best = torch.full((q, work.slots), -torch.inf, device=device)
    scan_runs[(len(work.entries) * work.runs,)](
        *rows, base, bitmap, work.entries, work.visitors, work.places, best, unit,
        len(work.entries), len(scales), length, len(parsed),
        N=ROWS, QUERIES=width, num_warps=4, enable_fp_fusion=False, **options,
    )  # fmt: skip
    keep = triton.next_power_of_2(k)
    firsts, ends, added = _selected(best_of_scores(best, keep), work, base, run)
    keys = torch.empty((q, keep * run), dtype=torch.int64, device=device)
    rescore_runs[(keep * run // RESCORED, q)](
        *rows, added, bitmap, firsts, ends, keys, unit, len(scales), length, len(parsed),
        N=RESCORED, num_warps=1, enable_fp_fusion=False, **options,
    )  # fmt: skip
    return best_of_keys(keys, k, None)


def _selected(
    keys: torch.Tensor, work: _Work, base: torch.Tensor, run: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return first rows, ends of ranges and bases of selected runs, (q, keep); no rows for none."""
    slot = rows_of_keys(keys)[1]
    there = slot >= 0
    slot = slot.clamp_min(0) + torch.arange(len(keys), device=keys.device)[:, None] * work.slots
    places, visits = work.places.sort()
    at = (torch.searchsorted(places, slot, right=True) - 1).clamp_min(0)
    visit = visits[at]
    owner = torch.searchsorted(work.entries[:, 2].contiguous(), visit, right=True) - 1
    entry = work.entries[owner.clamp_min(0)]
    firsts = torch.where(there, entry[..., 0] + (slot - places[at]) * run, 0)
    ends = torch.where(there, entry[..., 1], 0)
    return firsts, ends, base[visit]
