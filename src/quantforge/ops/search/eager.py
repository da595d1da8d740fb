"""Search in torch, tile by tile: neither vectors nor scores are ever held in full.

A score and a row make one integer that sorts as the tie rule says: the float32 score's bits, made
to order as an integer, above the row's complement.

    key = ordered(score) << 32 | 0xFFFFFFFF - row

Of a tile only the k runs of GROUP rows with the best maxima are made into keys: any other row has
k rows before it, also among equals, because a run's rows follow each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantforge.ops.scores import eager as scores_eager

TILE_SCORES = {"cpu": 1 << 20, "cuda": 1 << 22}
"""Scores of all queries held at once."""
MIN_TILE_ROWS = 256
GROUP = 64
"""Rows of which the best score stands for all."""
ROW_MASK = 0xFFFFFFFF
MAX_ROWS = 1 << 32


def search(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::search` on any device."""
    return search_by(
        scores_eager.scores, query, packed, scales, shift, equalizer, filter_bitmap, k, spec_key
    )


def search_by(
    scores: Callable[..., torch.Tensor],
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search by an implementation of `quantforge::scores` whose equal rows have equal scores."""
    dense = query.to(torch.float32)
    n = packed.shape[-2]
    absent = keys_of(torch.tensor(-torch.inf), torch.tensor(ROW_MASK)).to(query.device)
    best = absent.expand(query.shape[0], k)
    step = max(MIN_TILE_ROWS, TILE_SCORES[query.device.type] // max(1, query.shape[0]))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        tile = scores(dense, packed[rows], scales[rows], None, equalizer, spec_key)
        index = torch.arange(rows.start, rows.stop, device=query.device)
        if filter_bitmap is not None:
            hidden = ((filter_bitmap[index >> 3] >> (index & 7)) & 1) == 0
            tile.masked_fill_(hidden, -torch.inf)
        tile.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
        keys = _keys_of_best_groups(tile, index, k)
        best = torch.cat([best, keys], dim=1).topk(k, dim=1).values
    offset = None if shift is None else offsets_of(dense, shift)
    return results_of(best, offset)


def _keys_of_best_groups(tile: torch.Tensor, index: torch.Tensor, k: int) -> torch.Tensor:
    """Return keys (q, m) of scores (q, n) of rows `index` (n,): the k greatest are among them."""
    count = index.shape[0] // GROUP
    if count <= 2 * k:
        return keys_of(tile, index)
    grouped = tile[:, : count * GROUP].unflatten(1, (count, GROUP))
    groups = torch.arange(count, device=tile.device)
    order = keys_of(grouped.amax(-1), groups).topk(k, dim=1).values
    chosen = ROW_MASK - (order & ROW_MASK)  # (q, k)
    scores = grouped.gather(1, chosen.unsqueeze(-1).expand(-1, -1, GROUP))
    rows = index[: count * GROUP].view(count, GROUP)[chosen]
    rest = keys_of(tile[:, count * GROUP :], index[count * GROUP :])
    return torch.cat([keys_of(scores, rows).flatten(1), rest], dim=1)


def keys_of(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return one int64 for each score and row: greater for a higher score, then a smaller row."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (ROW_MASK - rows)


def results_of(
    keys: torch.Tensor, offset: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores (q, k) and rows of sorted keys; -inf and -1 where there is no row."""
    ordered = (keys >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    rows = torch.where(scores == -torch.inf, -1, ROW_MASK - (keys & ROW_MASK))
    return (scores if offset is None else scores + offset), rows


def offsets_of(query: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return what the shift adds to every score of a query, (q, 1): it moves no rank."""
    return (query * shift.to(torch.float32).reshape(-1)).sum(-1, keepdim=True)


def output_like(query: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty scores and rows, each (q, k)."""
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int64)
