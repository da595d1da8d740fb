"""Scores of rows and the best of them: the path that a search takes through the codes.

    score(q, row) = scores(q, codes of row) + base(q, list of row)

`best` is one pass over the lists by integer products (`integer_scan`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quantforge.ops.search.eager import ROW_MASK, keys_of, results_of
from quantforge.vectordb import integer_scan
from quantforge.vectordb.bounds import RowBounds
from quantforge.vectordb.codec import Codec, Queries
from quantforge.vectordb.lists import Lists
from quantforge.vectordb.rows import Rows

TILE_SCORES = 1 << 22
"""Scores of all queries held at once."""
MIN_TILE_ROWS = 256
GATHERED_QUERIES = 4
"""So many queries gather the rows of their lists; more of them go from list to list."""

Tile = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shelf:
    """What is scanned.

    Attributes:
        codec: scores codes.
        rows: holds them.
        lists: where they lie.
        coded: each list has a base of its own; otherwise all have the first.
        bounds: what the rows may have beyond their loud directions, if that is known.
        there: (ceil(n / 8),) uint8, bits of the rows that are not removed; None for all.
    """

    codec: Codec
    rows: Rows
    lists: Lists
    coded: bool
    bounds: RowBounds | None = None
    there: torch.Tensor | None = None

    def base(self, queries: Queries, labels: torch.Tensor) -> torch.Tensor:
        """Return what is added to scores of rows with these labels (m,), (q, m) or (q, 1)."""
        return queries.base[:, labels] if self.coded else queries.base

    def tile(self, queries: Queries, index: slice | torch.Tensor) -> torch.Tensor:
        """Return scores (q, m) of rows without the base: those that `best` orders by."""
        return self.codec.integer_scores(queries, self.rows.coded(index))


def tiles(shelf: Shelf, queries: Queries, allowed: torch.Tensor | None) -> Iterator[Tile]:
    """Yield rows (m,) and scores (q, m) of all of them, or those allowed (rising), in order."""
    count = len(shelf.rows) if allowed is None else len(allowed)
    step = tile_rows(len(queries.base))
    for start in range(0, count, step):
        stop = min(start + step, count)
        if allowed is None:
            rows = torch.arange(start, stop)
            tile = shelf.tile(queries, slice(start, stop))
        else:
            rows = allowed[start:stop]
            tile = shelf.tile(queries, rows)
        yield rows, tile + shelf.base(queries, shelf.lists.of_rows(rows))


def best(
    shelf: Shelf,
    queries: Queries,
    k: int,
    probes: torch.Tensor | None,
    allowed: torch.Tensor | None,
) -> Tile:
    """Return the k best scores (q, k), falling, and their rows; -inf and -1 where there is none.

    Args:
        shelf: what is scanned.
        queries: q of them.
        k: how many to find.
        probes: (q, p) int64, the lists to look into, -1 for none; None for all rows.
        allowed: rows that may be found, rising; None for all.
    """
    return integer_scan.best(shelf, queries, k, probes, allowed)


def best_by_tiles(
    shelf: Shelf,
    queries: Queries,
    k: int,
    probes: torch.Tensor | None,
    allowed: torch.Tensor | None,
) -> Tile:
    """Implement `best` on any device, a tile of scores at a time."""
    device = queries.base.device
    absent = keys_of(torch.tensor(-torch.inf), torch.tensor(ROW_MASK)).to(device)
    found = absent.expand(len(queries.base), k)
    if probes is None:
        for rows, tile in tiles(shelf, queries, allowed):
            found = _merge(found, tile, rows)
        return results_of(found, None)
    hidden = None
    if allowed is not None:
        hidden = torch.ones(len(shelf.rows), dtype=torch.bool, device=device)
        hidden[allowed] = False
    found = found.clone()
    visit = _by_query if len(probes) <= GATHERED_QUERIES else _by_list
    for part in (visit(shelf, queries, probes), _tail(shelf, queries, probes)):
        for which, rows, tile in part:
            if hidden is not None:
                tile.masked_fill_(hidden[rows], -torch.inf)
            found[which] = _merge(found[which], tile, rows)
    return results_of(found, None)


def above(
    shelf: Shelf, queries: Queries, threshold: float, allowed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return limits (q + 1,), rows and scores of all rows that score at least the threshold."""
    limits = torch.zeros(len(queries.base) + 1, dtype=torch.int64)
    which, found, scores = [limits[:0]], [limits[:0]], [torch.empty(0)]
    for rows, tile in tiles(shelf, queries, allowed):
        good = tile >= threshold
        query, column = good.nonzero().cpu().unbind(1)
        limits[1:] += torch.bincount(query, minlength=len(queries.base))
        which.append(query)
        found.append(rows[column])
        scores.append(tile[good].cpu())
    order = torch.cat(which).argsort(stable=True)
    return limits.cumsum(0), torch.cat(found)[order], torch.cat(scores)[order]


def tile_rows(queries: int) -> int:
    """Return how many rows are scored at once."""
    return max(MIN_TILE_ROWS, TILE_SCORES // max(1, queries))


def _merge(found: torch.Tensor, tile: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    k = found.shape[1]
    scores, column = tile.topk(min(k, len(rows)), dim=1)
    return torch.cat([found, keys_of(scores, rows[column])], 1).topk(k, dim=1).values


Visit = Iterator[tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor]]


def _by_query(shelf: Shelf, queries: Queries, probes: torch.Tensor) -> Visit:
    """Yield (query, rows, scores): all lists of a query together."""
    for i, chosen in enumerate(probes):
        labels = chosen[chosen >= 0]
        rows, owner = ranges(shelf.lists.starts[labels], shelf.lists.starts[labels + 1])
        one, labels = queries[i : i + 1], labels[owner]
        step = tile_rows(1)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            tile = shelf.tile(one, rows[part]) + shelf.base(one, labels[part])
            yield slice(i, i + 1), rows[part], tile


def _by_list(shelf: Shelf, queries: Queries, probes: torch.Tensor) -> Visit:
    """Yield (queries, rows, scores): all queries of a list together."""
    who, place = (probes >= 0).nonzero(as_tuple=True)
    lists, order = probes[who, place].sort(stable=True)
    who, starts = who[order], shelf.lists.starts.tolist()
    labels, counts = lists.unique_consecutive(return_counts=True)
    for label, which in zip(labels.tolist(), who.split(counts.tolist()), strict=True):
        some = queries[which]
        base = shelf.base(some, labels.new_tensor([label]))
        step = tile_rows(len(which))
        for start in range(starts[label], starts[label + 1], step):
            where = slice(start, min(start + step, starts[label + 1]))
            rows = torch.arange(where.start, where.stop, device=who.device)
            yield which, rows, shelf.tile(some, where) + base


def _tail(shelf: Shelf, queries: Queries, probes: torch.Tensor) -> Visit:
    """Yield (all queries, rows, scores) of the tail, where lists not asked for have -inf."""
    first, labels = shelf.lists.sorted_rows, shelf.lists.tail
    asked = torch.zeros(len(probes), shelf.lists.count + 1, dtype=torch.bool, device=labels.device)
    asked.scatter_(1, probes % (shelf.lists.count + 1), value=True)  # -1 is the place after all
    step = tile_rows(len(probes))
    for start in range(0, len(labels), step):
        own = labels[start : start + step].to(torch.int64)
        rows = torch.arange(first + start, first + start + len(own), device=own.device)
        tile = shelf.tile(queries, slice(first + start, first + start + len(own)))
        tile = tile + shelf.base(queries, own)
        yield slice(None), rows, tile.masked_fill_(~asked[:, own], -torch.inf)


def ranges(starts: torch.Tensor, stops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the integers of all ranges (m,), one after the other, and the range of each."""
    sizes = stops - starts
    owner = torch.arange(len(starts), device=starts.device).repeat_interleave(sizes)
    before = sizes.cumsum(0) - sizes
    return torch.arange(len(owner), device=starts.device) + (starts - before)[owner], owner


def nearest_lists(
    routes: torch.Tensor, counts: torch.Tensor, nprobe: int, need: int
) -> torch.Tensor:
    """Return the lists that queries look into, (q, p) int64, -1 for none.

    Args:
        routes: (q, lists), greater for nearer ones.
        counts: (lists,) rows that may be found in each.
        nprobe: look into so many, and into more until `need` rows are there.
        need: rows.
    """
    order = _ordered(routes, nprobe)
    short = counts[order].sum(1) < need
    if not bool(short.any()):
        return order
    whole = _ordered(routes[short], routes.shape[1])
    enough = (counts[whole].cumsum(1) < need).sum(1) + 1
    width = int(enough.max().clamp_max(routes.shape[1]))
    found = order.new_full((len(routes), max(width, nprobe)), -1)
    found[:, :nprobe] = order
    place = torch.arange(width, device=order.device)
    found[short, :width] = torch.where(place < enough[:, None], whole[:, :width], -1)
    return found


def _ordered(routes: torch.Tensor, count: int) -> torch.Tensor:
    if len(routes) == 1 and routes.device.type == "cpu":  # so few numbers cost less than calls
        return routes.sort(dim=1, descending=True, stable=True).indices[:, :count]
    lists = torch.arange(routes.shape[1], device=routes.device)
    keys = keys_of(routes, lists).topk(count, dim=1).values
    return ROW_MASK - (keys & ROW_MASK)
