"""Scores of many rows and the best of them: the path that a search takes through the codes.

    score(q, row) = products(q, codes of row) + offset of row + base(q, list of row)

`best` is the place for a faster way: it is given all that a single pass over the lists needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantforge.ops.search.eager import ROW_MASK, keys_of, results_of
from quantforge.vectordb.codec import Codec, Queries
from quantforge.vectordb.rows import Rows

TILE_SCORES = 1 << 22
"""Scores of all queries held at once."""
MIN_TILE_ROWS = 256


def tiles(
    codec: Codec, rows: Rows, queries: Queries, allowed: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield rows (m,) and scores (q, m) of all of them, or those allowed (rising), in order."""
    count = len(rows) if allowed is None else len(allowed)
    step = max(MIN_TILE_ROWS, TILE_SCORES // max(1, len(queries.base)))
    for start in range(0, count, step):
        stop = min(start + step, count)
        where = slice(start, stop) if allowed is None else allowed[start:stop]
        tile = codec.scores(queries, rows.coded(where)) + queries.base
        yield (torch.arange(start, stop) if allowed is None else allowed[start:stop]), tile


def best(
    codec: Codec, rows: Rows, queries: Queries, k: int, allowed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k best scores (q, k), falling, and their rows; -inf and -1 where there is none."""
    absent = keys_of(torch.tensor(-torch.inf), torch.tensor(ROW_MASK))
    found = absent.expand(len(queries.base), k)
    for index, tile in tiles(codec, rows, queries, allowed):
        scores, column = tile.topk(min(k, len(index)), dim=1)
        found = torch.cat([found, keys_of(scores, index[column])], 1).topk(k, dim=1).values
    return results_of(found, None)
