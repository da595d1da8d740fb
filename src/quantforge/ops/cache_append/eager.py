"""Appending in torch."""

from __future__ import annotations

import torch

from quantforge.ops.quantize import eager


def cache_append(
    packed: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> None:
    """Implement `quantforge::cache_append` on any device, without waiting for it."""
    new_packed, new_scales = eager.quantize(x, shift, equalizer, spec_key)
    rows = position.to(packed.device) + torch.arange(x.shape[-2], device=packed.device)
    packed.index_copy_(-2, rows, new_packed)
    scales.index_copy_(-2, rows, new_scales)
