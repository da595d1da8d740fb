"""Weighted sums in torch, tile by tile: the vectors are never decoded in full."""

from __future__ import annotations

import torch

from quantforge.ops.statistics import restore
from quantforge.ops.tiles import components, tiles
from quantforge.spec import QuantSpec


def combine(
    weights: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> torch.Tensor:
    """Implement `quantforge::combine` on any device."""
    spec = QuantSpec.from_key(spec_key)
    parts = components(spec, packed.device)
    out = output_like(weights, packed, spec.dim)
    sums = [
        out.new_zeros((*out.shape[:-1], len(part.decoder.order)), dtype=torch.float32)
        for part in parts
    ]
    for rows in tiles(packed, spec.dim, columns_per_row=weights.shape[:-1].numel()):
        w = weights[..., rows].to(torch.float32)
        for part, total in zip(parts, sums, strict=True):
            scale = scales[..., rows, part.column].to(torch.float32)
            total += (w * scale.unsqueeze(-2)) @ part.decoder(packed[..., rows, :])
    terms = [part.unproject(total) for part, total in zip(parts, sums, strict=True)]
    mass = None if shift is None else weights.sum(-1, keepdim=True, dtype=torch.float32)
    return out.copy_(restore(sum(terms[1:], terms[0]), shift, equalizer, mass))


def output_like(weights: torch.Tensor, packed: torch.Tensor, dim: int) -> torch.Tensor:
    """Return an empty (..., q, dim) tensor for weights (..., q, n)."""
    lead = torch.broadcast_shapes(weights.shape[:-2], packed.shape[:-2])
    return weights.new_empty((*lead, weights.shape[-2], dim))
