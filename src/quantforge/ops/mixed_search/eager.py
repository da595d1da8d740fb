"""Mixed search in torch: the same integers and the same float32 steps as every backend.

    total = sum over groups, in order, of float(sum of z t) * weight
    score = (total * scale + offset * unit) + base

Sums of integers below 2^24 are exact in float32 whatever their order, larger ones in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantforge.numerics.integers import IntegerTable, integer_table, lanes
from quantforge.ops.constants import cached_constant
from quantforge.ops.mixed_search.parts import integer_decoder, slices
from quantforge.ops.search.eager import ROW_MASK, keys_of, results_of
from quantforge.spec import QuantSpec

TILE_SCORES = {"cpu": 1 << 20, "cuda": 1 << 22}
"""Scores of all queries held at once."""
MIN_TILE_ROWS = 256
EXACT_FLOAT32 = 1 << 24


@cached_constant
def _lanes(spec: QuantSpec, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(lanes(spec)).to(device)


def query_integers(query: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Round queries (q, dim) as `numerics.integers.query_integers`; integers are float32.

    A query that is not finite has integers 0 and a unit of NaN.
    """
    table = integer_table(spec)
    peak = query.abs().amax(-1, keepdim=True)
    finite = query.isfinite().all(-1, keepdim=True)
    share = torch.where((peak > 0) & finite, query / peak, 0.0)
    most = torch.full_like(peak, table.most)
    found = (share * most).round()
    if table.room:
        lane = _lanes(spec, query.device)
        sums = query.new_zeros(2, len(query), int(lane.max()) + 1)
        signed = torch.stack([found.clamp_min(0), (-found).clamp_min(0)])
        worst = sums.index_add_(-1, lane, signed).amax((0, 2)).clamp_min(1).to(torch.int64)
        less = torch.div(table.room * table.most, worst, rounding_mode="floor")
        most = torch.where(worst > table.room, less, table.most).to(torch.float32)[:, None]
        found = (share * most).round()
    return found, torch.where(finite, peak / most, torch.nan)[:, 0]


class Products:
    """Queries as integers, to be multiplied with tiles of rows."""

    def __init__(self, query: torch.Tensor, specs: tuple[QuantSpec, ...]) -> None:
        self.parts = []
        for spec, where in zip(specs, slices(specs), strict=True):
            decoder, table = integer_decoder(spec, query.device), integer_table(spec)
            z, unit = query_integers(query[:, where], spec)
            z = torch.nn.functional.pad(z, (0, 1))[:, decoder.order]
            dtype = torch.float32 if _fits(table, spec) else torch.float64
            self.parts.append((decoder, z.to(dtype), unit * float(table.unit)))

    def totals(self, packed: list[torch.Tensor], queries: torch.Tensor | slice) -> torch.Tensor:
        """Return the totals (q, n) of some queries with rows."""
        total = torch.zeros((), device=packed[0].device)
        for (decoder, z, weight), rows in zip(self.parts, packed, strict=True):
            sums = z[queries] @ decoder(rows).to(z.dtype).T
            total = total + sums.to(torch.float32) * weight[queries, None]
        return total


def _fits(table: IntegerTable, spec: QuantSpec) -> bool:
    return table.bias * table.most * spec.dim < EXACT_FLOAT32


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
    """Implement `quantforge::mixed_search` on any device; it skips nothing."""
    products = Products(query, tuple(QuantSpec.from_key(key) for key in specs))
    absent = keys_of(torch.tensor(-torch.inf), torch.tensor(ROW_MASK)).to(query.device)
    best = absent.repeat(query.shape[0], k)
    for rows, visit in _tiles(ranges, starts, query.device):
        who: torch.Tensor | slice = slice(None) if visitors is None else visitors[visit]
        total = products.totals([part[rows] for part in packed], who)
        added = offsets[rows].to(torch.float32) * unit
        tile = (total * scales[rows, 0].to(torch.float32) + added) + base[visit, None]
        index = torch.arange(rows.start, rows.stop, device=query.device)
        if filter_bitmap is not None:
            hidden = ((filter_bitmap[index >> 3] >> (index & 7)) & 1) == 0
            tile.masked_fill_(hidden, -torch.inf)
        tile = torch.where(tile.isnan(), -torch.inf, tile)
        scores, column = _best_columns(tile, min(k, tile.shape[1]))
        keys = keys_of(scores, index[column])
        best[who] = torch.cat([best[who], keys], dim=1).topk(k, dim=1).values
    return rows_of_keys(best)


def _best_columns(tile: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k best scores and their columns, the first of equal ones."""
    columns = torch.arange(tile.shape[1], device=tile.device)
    order = keys_of(tile, columns).topk(k, dim=1).values
    column = ROW_MASK - (order & ROW_MASK)
    return tile.gather(1, column), column


def _tiles(
    ranges: torch.Tensor, starts: torch.Tensor, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each tile and its visits."""
    for (begin, end), first, last in zip(
        ranges.tolist(), starts.tolist(), starts.tolist()[1:], strict=False
    ):
        step = max(MIN_TILE_ROWS, TILE_SCORES[device.type] // max(1, last - first))
        for start in range(begin, end, step):
            if last > first:
                yield slice(start, min(start + step, end)), slice(first, last)


def rows_of_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and rows (q, k) of sorted keys; -inf and -1 where there is no row."""
    return results_of(keys, None)


def output_like(query: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty scores and rows, each (q, k)."""
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int64)
