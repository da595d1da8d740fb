"""Keys and values whose packed rows lie in several places: tiers of tokens, or groups of heads.

Each tier is a segment of its own, or several (`llm.joined`); segments are merged by their
log-sum-exp.
"""

from __future__ import annotations

import torch

from quantforge.llm.heads import HeadGroups
from quantforge.llm.importance import Slots
from quantforge.llm.joined import Part, Source, count, parts_of, rows_of
from quantforge.llm.paged import PagedRows
from quantforge.ops.attention import op as attention_op
from quantforge.ops.decode_attention import op as decode_op
from quantforge.ops.merge import Partial
from quantforge.tensor import QuantTensor

Places = Slots | HeadGroups | None
"""Where rows of several sources belong; None for one source of all tokens and heads."""


def is_paged(source: Source) -> bool:
    """Return whether all rows of a source lie in pages."""
    return all(isinstance(part, PagedRows) for part in parts_of(source))


def tokens_of(source: Source) -> int:
    """Return the rows of a source."""
    return sum(count(part) for part in parts_of(source))


def decode(sources: tuple[Source, ...], places: Places, dtype: torch.dtype) -> torch.Tensor:
    """Return the packed tokens (B, Hkv, n, dim) in the order of the text."""
    parts = [_decoded(source, dtype) for source in sources]
    if places is None:
        return parts[0]
    if isinstance(places, HeadGroups):
        return places.join(parts)
    joined = torch.cat(parts, 2)
    index = places.row_of.unsqueeze(-1).expand(-1, -1, -1, joined.shape[-1])
    return joined.gather(2, index)


def logits(query: torch.Tensor, sources: tuple[Source, ...], places: Places) -> torch.Tensor:
    """Return query (B, Hkv, rows, dim) times the packed keys, in the order of the text."""
    if isinstance(places, HeadGroups):
        return places.each(lambda i: _logits(places.part(query, i), sources[i]))
    parts = [_logits(query, source) for source in sources]
    if places is None:
        return parts[0]
    joined = torch.cat(parts, -1)
    index = places.row_of.unsqueeze(2).expand(-1, -1, joined.shape[2], -1)
    return joined.gather(3, index)


def combine(weights: torch.Tensor, sources: tuple[Source, ...], places: Places) -> torch.Tensor:
    """Return weights (B, Hkv, rows, n), in the order of the text, times the packed values."""
    if places is None:
        return _weighted(weights, sources[0])
    if isinstance(places, HeadGroups):
        return places.each(lambda i: _weighted(places.part(weights, i), sources[i]))
    filled = [tier for tier, rows in enumerate(places.rows) if rows]
    terms = [
        _weighted(_of_tier(weights, places, tier, 0.0), source)
        for tier, source in zip(filled, sources, strict=True)
    ]
    return sum(terms[1:], terms[0])


def _decoded(source: Source, dtype: torch.dtype) -> torch.Tensor:
    parts = [rows_of(part).dequantize(dtype) for part in parts_of(source)]
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _logits(query: torch.Tensor, source: Source) -> torch.Tensor:
    parts = [query @ rows_of(part).mT for part in parts_of(source)]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def _weighted(weights: torch.Tensor, source: Source) -> torch.Tensor:
    parts = parts_of(source)
    split = weights.split([count(part) for part in parts], -1)
    terms = [w @ rows_of(part) for w, part in zip(split, parts, strict=True)]
    return sum(terms[1:], terms[0])


def attend_packed(
    query: torch.Tensor,
    keys: tuple[Source | None, ...],
    values: tuple[Source | None, ...],
    places: Places,
    mask: torch.Tensor | None,
    scale: float,
) -> list[Partial]:
    """Attend to the packed rows of all sources: partial results to be merged.

    Args:
        query: (B, Hq, q, dim).
        keys: sources, None for one without rows.
        values: likewise.
        places: where their rows belong.
        mask: of the packed tokens, broadcasting to (B, Hq, q, n), bool or float; or None.
        scale: of the logits.
    """
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    partials: list[list[Partial]] = []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        if key is None or value is None:
            continue
        q, seen = query, mask
        if isinstance(places, HeadGroups):
            q = places.part_of_queries(query, i)
            seen = None if mask is None else places.part_of_queries(mask, i)
        elif places is not None:
            seen = _mask_of_tier(mask, places, i, query.shape[1])
        partials.append(attend_parts(q, parts_of(key), parts_of(value), seen, scale))
    if isinstance(places, HeadGroups):  # which have the same tokens in their parts
        by_part = [zip(*groups, strict=True) for groups in zip(*partials, strict=True)]
        return [(places.join_queries(outs), places.join_queries(lses)) for outs, lses in by_part]
    return [partial for parts in partials for partial in parts]


def attend_parts(
    query: torch.Tensor,
    keys: tuple[Part, ...],
    values: tuple[Part, ...],
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> list[Partial]:
    """Attend to parts that follow each other, with a mask of all their tokens.

    softcap: of parts in pages.
    """
    partials, start = [], 0
    for key, value in zip(keys, values, strict=True):
        stop = start + count(key)
        seen = mask if mask is None or mask.shape[-1] == 1 else mask[..., start:stop]
        partials.append(_attend(query, key, value, seen, scale, softcap))
        start = stop
    return partials


def _attend(
    query: torch.Tensor,
    key: Part,
    value: Part,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> Partial:
    paged = isinstance(key, PagedRows) and isinstance(value, PagedRows)
    plain = mask is None or mask.dtype == torch.bool
    if paged and plain and not key.first and query.dtype == key.dtype:  # type: ignore[union-attr]
        return _attend_pages(query, key, value, mask, scale, softcap)  # type: ignore[arg-type]
    assert not softcap, "caps are for pages"
    return _attend_rows(query, rows_of(key), rows_of(value), mask, scale)


def _attend_pages(
    query: torch.Tensor,
    key: PagedRows,
    value: PagedRows,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> Partial:
    """Attend to pages alone by the fused operator."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    out, lse = decode_op.decode_attention(
        query,
        key.pages.flatten(0, 1),
        value.pages.flatten(0, 1),
        *(None, None, key.n, None),
        *(None, None, None, 0, 0),
        *(mask, False),
        *(key.shift, key.equalizer, value.shift, value.equalizer),
        *(scale, softcap, 0),
        *(key.format.spec.key, value.format.spec.key),
    )
    return out, lse


def _attend_rows(
    query: torch.Tensor,
    key: QuantTensor,
    value: QuantTensor,
    mask: torch.Tensor | None,
    scale: float,
) -> Partial:
    return attention_op.attention(
        query,
        *(key._packed, key._scales, key._shift, key._equalizer),
        *(value._packed, value._scales, value._shift, value._equalizer),
        *(mask, False, scale, key._spec_key, value._spec_key),
    )


def within(mask: torch.Tensor | None, query: torch.Tensor, n: int, window: int) -> torch.Tensor:
    """Return a bool mask that lets queries, the last of n tokens, see a window of them only."""
    place = torch.arange(n, device=query.device)
    seen = (place > place[n - query.shape[2] :, None] - window)[None, None]
    return seen if mask is None else mask & seen


def _mask_of_tier(
    mask: torch.Tensor | None, slots: Slots, tier: int, heads: int
) -> torch.Tensor | None:
    """Return the mask of a tier's rows, (B, Hq, q, rows), None where all are seen.

    Args:
        mask: of the packed tokens, (B or 1, Hq or 1, q or 1, n), bool or float; or None.
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
