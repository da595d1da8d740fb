"""Scores in torch, tile by tile: the vectors are never decoded in full."""

from __future__ import annotations

from math import prod

import torch

from quantforge.ops.statistics import equalize_query
from quantforge.ops.tiles import components, tiles
from quantforge.spec import QuantSpec


def scores(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
    precision: str = "exact",
) -> torch.Tensor:
    """Implement `quantforge::scores` on any device: exact whatever the precision."""
    spec = QuantSpec.from_key(spec_key)
    parts = components(spec, packed.device)
    equalized = equalize_query(query, equalizer)
    projected = [part.project(equalized) for part in parts]
    out = output_like(query, packed)
    offset = None
    if shift is not None:
        offset = (query.to(torch.float32) * shift.to(torch.float32)).sum(-1, keepdim=True)
    for rows in tiles(packed, spec.dim, columns_per_row=prod(out.shape[:-1])):
        tile = torch.zeros((), device=packed.device)
        for part, q in zip(parts, projected, strict=True):
            values = part.decoder(packed[..., rows, :])
            scale = scales[..., rows, part.column].to(torch.float32)
            tile = tile + (q @ values.mT).mul_(scale.unsqueeze(-2))
        out[..., rows] = tile if offset is None else tile + offset
    return out


def output_like(query: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Return an empty (..., q, n) tensor for scores of query (..., q, dim)."""
    lead = query.shape[:-2]
    if lead != packed.shape[:-2]:  # the call costs more than short products
        lead = torch.broadcast_shapes(lead, packed.shape[:-2])
    return query.new_empty((*lead, query.shape[-2], packed.shape[-2]))
