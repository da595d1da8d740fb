"""Search in torch, tile by tile: neither vectors nor scores are ever held in full.

A score and a row make one integer that sorts as the tie rule says: the float32 score's bits, made
to order as an integer, above the row's complement.

    key = ordered(score) << 32 | 0xFFFFFFFF - row
"""

from __future__ import annotations

import torch

from quantforge.ops.scores import eager as scores_eager

TILE_SCORES = {"cpu": 1 << 20, "cuda": 1 << 22}
"""Scores of all queries held at once."""
MIN_TILE_ROWS = 256
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
    dense = query.to(torch.float32)
    n = packed.shape[-2]
    absent = keys_of(torch.tensor(-torch.inf), torch.tensor(ROW_MASK)).to(query.device)
    best = absent.expand(query.shape[0], k)
    step = max(MIN_TILE_ROWS, TILE_SCORES[query.device.type] // max(1, query.shape[0]))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        tile = scores_eager.scores(dense, packed[rows], scales[rows], None, equalizer, spec_key)
        index = torch.arange(rows.start, rows.stop, device=query.device)
        hidden = tile.isnan()
        if filter_bitmap is not None:
            hidden |= ((filter_bitmap[index >> 3] >> (index & 7)) & 1) == 0
        keys = keys_of(tile.masked_fill_(hidden, -torch.inf), index)
        best = torch.cat([best, keys], dim=1).topk(k, dim=1).values
    offset = None if shift is None else offsets_of(dense, shift)
    return results_of(best, offset)


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
