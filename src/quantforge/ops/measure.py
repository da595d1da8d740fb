"""Shift and equalizer measured on tensors, as `numerics.statistics` defines them."""

from __future__ import annotations

import torch

from quantforge.numerics.statistics import EQUALIZER_EXPONENT, MIN_EQUALIZER


def measure(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return shift and equalizer, each (..., 1, dim) float32, of vectors (..., n, dim)."""
    x = x.to(torch.float32)
    shift = x.mean(-2, keepdim=True)
    rms = (x - shift).square_().mean(-2, keepdim=True).sqrt_()
    peak = rms.amax(-1, keepdim=True)
    relative = torch.where(peak > 0, rms / peak, 1.0)
    return shift, relative.pow_(EQUALIZER_EXPONENT).clamp_min_(MIN_EQUALIZER)
