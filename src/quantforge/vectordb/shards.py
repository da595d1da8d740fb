"""Several indexes searched as one, and which process holds which of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from quantforge.vectordb.index import QuantizedIndex

Found = tuple[np.ndarray, np.ndarray]
Assignment = dict[int, list[str]]
"""Names of shards by rank."""


def merge_found(parts: Iterable[Found], k: int, *, squared: bool) -> Found:
    """Join results of the same queries: best score first, then the smallest id.

    Args:
        parts: ids (q, m) and scores (q, m) each, for any m; scores that are not finite stand for
            nothing found.
        k: results that are kept.
        squared: whether the least score is the best.

    Returns:
        ids (q, k) and scores (q, k) float32; -1 (None) and -inf (inf) where there are fewer.
    """
    parts = list(parts)
    ids = np.concatenate([part[0] for part in parts], 1)
    scores = np.concatenate([part[1] for part in parts], 1).astype(np.float32)
    texts = ids.dtype == object
    best = np.full((len(ids), k), None if texts else -1, object if texts else np.int64)
    best_scores = np.full((len(ids), k), np.inf if squared else -np.inf, np.float32)
    for i, (names, own) in enumerate(zip(ids, scores, strict=True)):
        there = np.isfinite(own)
        names, own = names[there], own[there]
        places = np.unique(names, return_inverse=True)[1]  # objects cannot be sorted by lexsort
        order = np.lexsort((places, own if squared else -own))[:k]
        best[i, : len(order)], best_scores[i, : len(order)] = names[order], own[order]
    return best, best_scores


def search_exactly(index: QuantizedIndex, queries: Any, k: int, **options: Any) -> Found:
    """Search so that of equal scores the smallest ids are found, whatever rows they lie in.

    Takes more than k until the last of them scores worse than the k-th.
    """
    n = len(index)
    kept = min(k, n)
    taken = min(kept + 1, n)
    while True:
        ids, scores = index.search(queries, taken, **options)
        open_end = np.isfinite(scores[:, -1]) & (scores[:, -1] == scores[:, kept - 1])
        if taken == n or not open_end.any():
            return merge_found([(ids, scores)], kept, squared=index.config.metric == "l2")
        taken = min(2 * taken, n)


def search_shards(shards: Sequence[QuantizedIndex], queries: Any, k: int, **options: Any) -> Found:
    """Search indexes that hold vectors, at least one, as one."""
    found = [search_exactly(index, queries, k, **options) for index in shards]
    return merge_found(found, k, squared=shards[0].config.metric == "l2")


def assign(sizes: Mapping[str, int], ranks: Sequence[int], before: Assignment) -> Assignment:
    """Spread shards over ranks by size, moving few of those that have a place.

    Args:
        sizes: bytes by name.
        ranks: that take part.
        before: where shards are now; ranks and shards that have gone may be in it.

    Returns:
        Names by rank. New ones go to the least loaded rank, greatest first; then one moves from
        the fullest rank to the emptiest for as long as that makes the fullest smaller.
    """
    held = {rank: [name for name in before.get(rank, ()) if name in sizes] for rank in ranks}

    def load(rank: int) -> int:
        return sum(sizes[name] for name in held[rank])

    placed = {name for names in held.values() for name in names}
    for name in sorted(sizes.keys() - placed, key=lambda name: (-sizes[name], name)):
        held[min(ranks, key=lambda rank: (load(rank), rank))].append(name)
    while True:
        full, empty = max(ranks, key=load), min(ranks, key=load)
        gap = load(full) - load(empty)
        movable = [name for name in held[full] if 0 < sizes[name] < gap]
        if not movable:
            return {rank: sorted(names) for rank, names in held.items()}
        name = min(movable, key=lambda name: (abs(gap - 2 * sizes[name]), name))
        held[full].remove(name)
        held[empty].append(name)
