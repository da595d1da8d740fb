"""Shift and equalizer measured on tensors, as `numerics.statistics` defines them."""

from __future__ import annotations

import torch

from quantforge.numerics.statistics import EQUALIZER_EXPONENT, MIN_EQUALIZER


def measure(
    x: torch.Tensor, query_rms: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return shift and equalizer, each (..., 1, dim) float32, of vectors (..., n, dim).

    Args:
        x: float tensor.
        query_rms: RMS of the channels (..., 1, dim) of the queries that x will meet, if known.
    """
    shift, rms = moments(x)
    return shift, equalizer_of(rms, query_rms)


def moments(x: torch.Tensor, real: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean, and the RMS about it, of each channel: (..., 1, dim) float32.

    Args:
        x: (..., n, dim) float tensor.
        real: (..., n) bool, broadcasting: vectors that count; None for all.
    """
    x = x.to(torch.float32)
    if real is None:
        shift = x.mean(-2, keepdim=True)
        return shift, (x - shift).square_().mean(-2, keepdim=True).sqrt_()
    skipped = ~real.unsqueeze(-1)
    count = real.sum(-1)[..., None, None].clamp_min(1)
    shift = x.masked_fill(skipped, 0).sum(-2, keepdim=True) / count
    squares = (x - shift).square_().masked_fill_(skipped, 0)
    return shift, (squares.sum(-2, keepdim=True) / count).sqrt_()


def equalizer_of(rms: torch.Tensor, query_rms: torch.Tensor | None = None) -> torch.Tensor:
    """Return the equalizer (..., 1, dim) of channels with some RMS (..., 1, dim)."""
    if query_rms is not None:
        peak = query_rms.amax(-1, keepdim=True)
        floor = torch.where(peak > 0, MIN_EQUALIZER * peak, 1.0)
        rms = rms / torch.maximum(query_rms, floor)
    peak = rms.amax(-1, keepdim=True)
    relative = torch.where(peak > 0, rms / peak, 1.0)
    return relative.pow_(EQUALIZER_EXPONENT).clamp_min_(MIN_EQUALIZER)
