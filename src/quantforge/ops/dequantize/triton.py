"""Dequantization by one Triton kernel: codes to vectors without an intermediate in memory."""

from __future__ import annotations

import torch

from quantforge.ops.kernels.arguments import statistics_of, why_not
from quantforge.ops.kernels.axes import TOO_MANY, merge, row_strides
from quantforge.ops.kernels.dequantize_launch import launch
from quantforge.spec import QuantSpec


def supports(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
    dtype: torch.dtype,
) -> str | None:
    """Return why these arguments are not for the kernel, or None."""
    lead, statistics = packed.shape[:-1], statistics_of(shift, equalizer)
    strides = [row_strides(t, lead) for t in (packed, scales, *statistics.given)]
    if merge(strides, lead, keep_rows=statistics.differ) is None:
        return TOO_MANY
    return why_not(QuantSpec.from_key(spec_key), packed, dtype)


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Implement `quantforge::dequantize` on a GPU."""
    spec = QuantSpec.from_key(spec_key)
    lead, statistics = packed.shape[:-1], statistics_of(shift, equalizer)
    out = torch.empty((*lead, spec.dim), dtype=dtype, device=packed.device)
    strides = [row_strides(t, lead) for t in (out, packed, scales, *statistics.given)]
    axes = merge(strides, lead, keep_rows=statistics.differ)
    assert axes is not None, "supports() admits no other shapes"
    launch(out, packed, scales, statistics, spec, axes)
    return out
