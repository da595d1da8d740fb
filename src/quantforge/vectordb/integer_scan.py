"""The best rows by the operator `mixed_search`: one call for all lists, queries and groups.

Rows that lie list by list are searched where they are. Rows of the tail, and few rows that a
filter leaves, are gathered in the order of their lists first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from quantforge.ops import mixed_search
from quantforge.ops.mixed_search.parts import Bounds, Visits
from quantforge.ops.search.eager import ROW_MASK, keys_of, results_of
from quantforge.vectordb.codec import Coded, Queries

if TYPE_CHECKING:
    from quantforge.vectordb.scan import Shelf

GATHERED_SHARE = 8
"""Rows that a filter leaves are gathered where they are less than one in so many."""

Found = tuple[torch.Tensor, torch.Tensor]


def best(
    shelf: Shelf,
    queries: Queries,
    k: int,
    probes: torch.Tensor | None,
    allowed: torch.Tensor | None,
) -> Found:
    """Return the k best scores (q, k), falling, and their rows, as `scan.best`."""
    if probes is None and shelf.coded:
        probes = torch.arange(shelf.lists.count).expand(len(queries.base), -1)
    probes = None if probes is None else probes.cpu()
    device = queries.base.device
    if allowed is not None and GATHERED_SHARE * len(allowed) < len(shelf.rows):
        return _gathered(shelf, queries, k, probes, allowed)
    bitmap = shelf.there if allowed is None else _bitmap_of(allowed, len(shelf.rows)).to(device)
    if probes is None:
        return _in_place(shelf, queries, queries.base[:, 0], k, None, bitmap)
    first = shelf.lists.sorted_rows
    who, lists, labels, starts = _visits(probes)
    ranges = torch.stack([shelf.lists.starts[labels], shelf.lists.starts[labels + 1]], 1)
    visits = Visits(ranges, starts, who.to(device))
    base = queries.base[who, lists if shelf.coded else 0]
    found = _in_place(shelf, queries, base, k, visits, bitmap)
    if first == len(shelf.rows):
        return found
    tail = torch.arange(first, len(shelf.rows))
    if shelf.there is not None:
        tail = tail[(shelf.there.cpu()[tail >> 3] >> (tail & 7)) % 2 > 0]
    if allowed is not None:
        tail = allowed[allowed >= first]
    other = _gathered(shelf, queries, k, probes, tail)
    keys = torch.cat([_keys(found), _keys(other)], 1)
    return results_of(keys.topk(k, dim=1).values, None)


def _in_place(
    shelf: Shelf,
    queries: Queries,
    base: torch.Tensor,
    k: int,
    visits: Visits | None,
    bitmap: torch.Tensor | None,
) -> Found:
    """Search rows where they are, by a call that is ready where there is one."""
    ready = None if shelf.bounds is None else shelf.bounds.search(shelf.rows)
    if ready is not None:
        return ready(queries.turned, base, k, bitmap, visits)
    coded = shelf.rows.coded(slice(None))
    bounds = None
    if shelf.bounds is not None and base.device.type == "cpu":
        bounds = shelf.bounds.of(shelf.rows)
    return _search(shelf, queries, base, coded, k, visits, bounds, bitmap)


def _gathered(
    shelf: Shelf, queries: Queries, k: int, probes: torch.Tensor | None, rows: torch.Tensor
) -> Found:
    """Search some rows (m,), in the order of their lists; of equal scores the first rows."""
    if probes is None:
        coded, visits, base = shelf.rows.coded(rows), None, queries.base[:, 0]
    else:
        labels, order = shelf.lists.of_rows(rows).sort(stable=True)
        rows = rows[order]
        coded = shelf.rows.coded(rows)
        there, counts = labels.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        asked = torch.zeros(len(probes), shelf.lists.count + 1, dtype=torch.bool)
        asked.scatter_(1, probes % (shelf.lists.count + 1), value=True)  # -1 is the last place
        which, who = asked[:, there].T.nonzero(as_tuple=True)
        starts = torch.searchsorted(which, torch.arange(len(there) + 1))
        visits = Visits(torch.stack([ends - counts, ends], 1), starts, who.to(queries.base.device))
        base = queries.base[who, there[which] if shelf.coded else 0]
    scores, found = _search(shelf, queries, base, coded, k, visits, None, None)
    if not len(rows):
        return scores, found
    return scores, torch.where(found >= 0, rows.to(found.device)[found.clamp_min(0)], -1)


def _search(
    shelf: Shelf,
    queries: Queries,
    base: torch.Tensor,
    coded: Coded,
    k: int,
    visits: Visits | None,
    bounds: Bounds | None,
    bitmap: torch.Tensor | None,
) -> Found:
    specs = tuple(spec for spec, _ in shelf.codec.groups)
    return mixed_search(
        queries.turned,
        coded.packed,
        specs,
        coded.scales,
        coded.offsets,
        base.contiguous(),
        k,
        unit=shelf.codec.unit,
        visits=visits,
        bounds=bounds,
        filter_bitmap=bitmap,
    )


def _visits(
    probes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries and lists of all visits by list, the lists that are visited, and starts."""
    if len(probes) == 1:
        lists = probes[0][probes[0] >= 0].sort().values
        return torch.zeros_like(lists), lists, lists, torch.arange(len(lists) + 1)
    who, place = (probes >= 0).nonzero(as_tuple=True)
    lists, order = probes[who, place].sort(stable=True)
    labels, counts = lists.unique_consecutive(return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return who[order], lists, labels, starts


def _bitmap_of(rows: torch.Tensor, count: int) -> torch.Tensor:
    mask = np.zeros(count, bool)
    mask[rows.numpy()] = True
    return torch.from_numpy(np.packbits(mask, bitorder="little"))


def _keys(found: Found) -> torch.Tensor:
    scores, rows = found
    return keys_of(scores, torch.where(rows >= 0, rows, ROW_MASK))
