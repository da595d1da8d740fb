"""Quantization by one Triton kernel, bit for bit as `numerics.encode`."""

from __future__ import annotations

import torch

from quantforge.numerics.packing import packed_width
from quantforge.ops.kernels.arguments import statistics_of
from quantforge.ops.kernels.axes import TOO_MANY, merge, row_strides
from quantforge.ops.kernels.quantize_launch import launch, why_not
from quantforge.spec import QuantSpec


def supports(
    x: torch.Tensor, shift: torch.Tensor | None, equalizer: torch.Tensor | None, spec_key: str
) -> str | None:
    """Return why these arguments are not for the kernel, or None."""
    lead, statistics = x.shape[:-1], statistics_of(shift, equalizer)
    strides = [row_strides(t, lead) for t in (x, *statistics.given)]
    if merge(strides, lead, keep_rows=statistics.differ) is None:
        return TOO_MANY
    return why_not(QuantSpec.from_key(spec_key), x)


def quantize(
    x: torch.Tensor, shift: torch.Tensor | None, equalizer: torch.Tensor | None, spec_key: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::quantize` on a GPU."""
    spec = QuantSpec.from_key(spec_key)
    lead, scale_dtype = x.shape[:-1], getattr(torch, spec.scale_dtype)
    packed = torch.empty((*lead, packed_width(spec)), dtype=torch.uint8, device=x.device)
    scales = torch.empty((*lead, spec.scales_per_vector), dtype=scale_dtype, device=x.device)
    statistics = statistics_of(shift, equalizer)
    strides = [row_strides(t, lead) for t in (x, packed, scales, *statistics.given)]
    axes = merge(strides, lead, keep_rows=statistics.differ)
    assert axes is not None, "supports() admits no other shapes"
    launch(packed, scales, x, 0, statistics, spec, axes, capacity=axes.sizes[2])
    return packed, scales
