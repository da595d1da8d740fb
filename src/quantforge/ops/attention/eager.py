"""Attention in torch: an online softmax over tiles of packed keys and values.

Extra memory is a few tiles whatever the length of the history; a tile of codes is looked up,
used by all query heads of its key head, and forgotten. (Online softmax: arXiv 1805.02867.)
"""

from __future__ import annotations

import torch

from quantforge.ops.statistics import equalize_query, restore
from quantforge.ops.tiles import components, tiles
from quantforge.spec import QuantSpec

MAX_QUERY_ROWS = 1 << 14
"""Query rows, all heads together, that share one pass over the codes."""


def attention(
    query: torch.Tensor,
    k_packed: torch.Tensor,
    k_scales: torch.Tensor,
    k_shift: torch.Tensor | None,
    k_equalizer: torch.Tensor | None,
    v_packed: torch.Tensor,
    v_scales: torch.Tensor,
    v_shift: torch.Tensor | None,
    v_equalizer: torch.Tensor | None,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    k_spec_key: str,
    v_spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::attention` on any device."""
    k_spec, v_spec = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    batch, heads, length, _ = query.shape
    out = query.new_empty((batch, heads, length, v_spec.dim), dtype=torch.float32)
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    step = max(1, MAX_QUERY_ROWS // max(batch * heads, 1))
    for start in range(0, length, step):
        queries = slice(start, min(start + step, length))
        state = _OnlineSoftmax(query[:, :, queries], k_shift, k_equalizer, k_packed, k_spec, v_spec)
        bias = _Bias(mask, is_causal, queries, k_packed)
        for rows in tiles(k_packed, k_spec.dim + v_spec.dim, columns_per_row=state.rows):
            logits = state.logits(k_packed[..., rows, :], k_scales[..., rows, :], scale)
            state.add(bias.apply(logits, rows), v_packed[..., rows, :], v_scales[..., rows, :])
        out[:, :, queries], lse[:, :, queries] = state.finish(scale, v_shift, v_equalizer)
    return out, lse


class _OnlineSoftmax:
    """Running maximum, sum and weighted values of some queries, (batch, Hkv, q_per_kv * q, ...)."""

    def __init__(
        self,
        query: torch.Tensor,
        k_shift: torch.Tensor | None,
        k_equalizer: torch.Tensor | None,
        k_packed: torch.Tensor,
        k_spec: QuantSpec,
        v_spec: QuantSpec,
    ) -> None:
        self.shape = query.shape[:-1]
        batch, kv_heads = k_packed.shape[:2]
        grouped = query.reshape(batch, kv_heads, -1, query.shape[-1]).to(torch.float32)
        self.rows = grouped.shape[:-1].numel()
        self.shift_logits = None
        if k_shift is not None:
            self.shift_logits = (grouped * k_shift.to(torch.float32)).sum(-1)
        self.keys = components(k_spec, query.device)
        self.values = components(v_spec, query.device)
        equalized = equalize_query(grouped, k_equalizer)
        self.query = [part.project(equalized) for part in self.keys]
        self.maximum = grouped.new_full(grouped.shape[:-1], -torch.inf)
        self.mass = grouped.new_zeros(grouped.shape[:-1])
        self.sums = [
            grouped.new_zeros((*grouped.shape[:-1], len(part.decoder.order)))
            for part in self.values
        ]

    def logits(self, packed: torch.Tensor, scales: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the scaled logits of a tile of keys, less the constant of the shift."""
        total = None
        for part, query in zip(self.keys, self.query, strict=True):
            key_scale = scales[..., part.column].to(torch.float32) * scale
            term = (query @ part.decoder(packed).mT).mul_(key_scale.unsqueeze(-2))
            total = term if total is None else total.add_(term)
        assert total is not None, "a code has at least one component"
        return total

    def add(self, logits: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> None:
        """Add a tile of values under its logits."""
        maximum = torch.maximum(self.maximum, logits.amax(-1))
        reference = torch.where(maximum == -torch.inf, 0.0, maximum)
        weights = logits.sub_(reference.unsqueeze(-1)).exp_()
        correction = (self.maximum - reference).exp_()
        self.maximum = maximum
        self.mass = self.mass * correction + weights.sum(-1)
        for part, total in zip(self.values, self.sums, strict=True):
            scaled = weights * scales[..., part.column].to(torch.float32).unsqueeze(-2)
            total.mul_(correction.unsqueeze(-1)).add_(scaled @ part.decoder(packed))

    def finish(
        self, scale: float, v_shift: torch.Tensor | None, v_equalizer: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp; a query that sees no key gives 0 and -inf."""
        seen = (self.mass > 0).to(torch.float32).unsqueeze(-1)
        inverse_mass = torch.where(self.mass > 0, self.mass.reciprocal(), 0.0).unsqueeze(-1)
        terms = [
            part.unproject(total * inverse_mass)
            for part, total in zip(self.values, self.sums, strict=True)
        ]
        out = restore(sum(terms[1:], terms[0]), v_shift, v_equalizer, seen)
        lse = self.mass.log() + torch.where(self.mass > 0, self.maximum, 0.0)
        if self.shift_logits is not None:
            lse = lse + self.shift_logits * scale
        return out.view(*self.shape, -1), lse.view(self.shape)


class _Bias:
    """The mask of some queries, applied tile by tile to grouped logits."""

    def __init__(
        self, mask: torch.Tensor | None, is_causal: bool, queries: slice, packed: torch.Tensor
    ) -> None:
        self.kv_heads, self.length = packed.shape[1], queries.stop - queries.start
        self.first_query, self.is_causal, self.mask = queries.start, is_causal, None
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            self.mask = mask if mask.shape[2] == 1 else mask[:, :, queries]

    def apply(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """Add the mask of key rows to logits (batch, Hkv, q_per_kv * q, n) in place."""
        if self.mask is None and not self.is_causal:
            return logits
        grouped = logits.view(logits.shape[0], self.kv_heads, -1, self.length, logits.shape[-1])
        if self.mask is not None:
            tile = self.mask[..., rows]
            per_head = tile.shape[1] != 1
            tile = tile.unflatten(1, (self.kv_heads, -1)) if per_head else tile.unsqueeze(1)
            if tile.dtype == torch.bool:
                grouped.masked_fill_(~tile, -torch.inf)
            else:
                grouped += tile
        if self.is_causal:
            query = torch.arange(self.length, device=logits.device) + self.first_query
            key = torch.arange(rows.start, rows.stop, device=logits.device)
            grouped.masked_fill_(key > query[:, None], -torch.inf)
        return logits
