"""Attention over keys and values whose packed rows lie in several tiers of bits.

Each tier is a segment of its own; the segments are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch

from quantforge.llm.importance import Slots
from quantforge.llm.paged import PagedRows
from quantforge.tensor import QuantTensor

Source = QuantTensor | PagedRows
"""The packed rows of a tier."""


def rows_of(source: Source) -> QuantTensor:
    """Return a tier as rows."""
    return source.rows if isinstance(source, PagedRows) else source


def decode(sources: tuple[Source, ...], slots: Slots | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the packed tokens (B, Hkv, n, dim) in the order of the text."""
    parts = [rows_of(source).dequantize(dtype) for source in sources]
    if slots is None:
        return parts[0]
    joined = torch.cat(parts, 2)
    index = slots.row_of.unsqueeze(-1).expand(-1, -1, -1, joined.shape[-1])
    return joined.gather(2, index)


def logits(query: torch.Tensor, sources: tuple[Source, ...], slots: Slots | None) -> torch.Tensor:
    """Return query (B, Hkv, rows, dim) times the packed keys, in the order of the text."""
    parts = [query @ rows_of(source).mT for source in sources]
    if slots is None:
        return parts[0]
    joined = torch.cat(parts, -1)
    index = slots.row_of.unsqueeze(2).expand(-1, -1, joined.shape[2], -1)
    return joined.gather(3, index)


def combine(
    weights: torch.Tensor, sources: tuple[Source, ...], slots: Slots | None
) -> torch.Tensor:
    """Return weights (B, Hkv, rows, n), in the order of the text, times the packed values."""
    if slots is None:
        return weights @ rows_of(sources[0])
    filled = [tier for tier, rows in enumerate(slots.rows) if rows]
    terms = [
        _of_tier(weights, slots, tier, 0.0) @ rows_of(source)
        for tier, source in zip(filled, sources, strict=True)
    ]
    return sum(terms[1:], terms[0])


def mask_of_tier(
    mask: torch.Tensor | None, slots: Slots, tier: int, heads: int
) -> torch.Tensor | None:
    """Return the mask of a tier's rows, (B, Hq or Hkv.., q, rows), None where all are seen.

    Args:
        mask: of the packed tokens, broadcasting to (B, Hq, q, n), bool or float; or None.
        slots: where the tokens are.
        tier: which.
        heads: query heads.
    """
    if mask is None:
        if not slots.dead:
            return None
        seen = slots.places(tier).unsqueeze(2) >= 0  # (B, Hkv, 1, rows)
        return seen.repeat_interleave(heads // seen.shape[1], 1)
    batch, kv_heads = slots.tiers.shape[:2]
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    per_kv = 1 if mask.shape[1] == 1 else heads // kv_heads
    full = mask.expand(batch, kv_heads * per_kv, -1, -1)
    by_head = full.unflatten(1, (kv_heads, per_kv)).flatten(2, 3)
    fill = False if mask.dtype == torch.bool else -torch.inf
    out = _of_tier(by_head, slots, tier, fill).unflatten(2, (per_kv, -1)).flatten(1, 2)
    return out.repeat_interleave(heads // out.shape[1], 1)


def _of_tier(x: torch.Tensor, slots: Slots, tier: int, fill: float) -> torch.Tensor:
    """Return what of x (B, Hkv, rows, n) belongs to the rows of a tier; `fill` for dead ones."""
    places = slots.places(tier).unsqueeze(2)
    taken = x.gather(3, places.clamp_min(0).expand(-1, -1, x.shape[2], -1))
    return taken.masked_fill_(places < 0, fill) if slots.dead else taken
