"""Dequantization in torch, tile by tile."""

from __future__ import annotations

import torch

from quantforge.ops.statistics import flatten, is_shared, restore
from quantforge.ops.tiles import components, tiles
from quantforge.spec import QuantSpec


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Implement `quantforge::dequantize` on any device."""
    spec = QuantSpec.from_key(spec_key)
    out = torch.empty((*packed.shape[:-1], spec.dim), dtype=dtype, device=packed.device)
    target = out
    if is_shared(shift) and is_shared(equalizer):  # one long axis: even tiles
        packed, scales = (t.reshape(-1, t.shape[-1]) for t in (packed, scales))
        shift, equalizer = flatten(shift), flatten(equalizer)
        target = out.view(-1, spec.dim)
    for rows in tiles(packed, 2 * spec.dim):
        terms = []
        for part in components(spec, packed.device):
            scale = scales[..., rows, part.column, None].to(torch.float32)
            terms.append(part.unproject(part.decoder(packed[..., rows, :]) * scale))
        target[..., rows, :] = restore(sum(terms[1:], terms[0]), shift, equalizer)
    return out
