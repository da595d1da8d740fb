"""Appending by the kernel of `quantize`, which writes into the buffers."""

from __future__ import annotations

import torch

from quantforge.ops.kernels.arguments import Statistics, statistics_of
from quantforge.ops.kernels.axes import TOO_MANY, Axes, merge, row_strides
from quantforge.ops.kernels.quantize_launch import launch, why_not
from quantforge.spec import QuantSpec


def _axes(
    packed: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, statistics: Statistics
) -> Axes | None:
    lead = x.shape[:-1]
    strides = [row_strides(t, lead) for t in (x, *statistics.given)]
    strides[1:1] = [packed.stride()[:-1], scales.stride()[:-1]]
    return merge(strides, lead, keep_rows=True)


def supports(
    packed: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> str | None:
    """Return why these arguments are not for the kernel, or None."""
    if packed.stride(-1) != 1:
        return "the bytes of a packed row are not contiguous"
    if _axes(packed, scales, x, statistics_of(shift, equalizer)) is None:
        return TOO_MANY
    return why_not(QuantSpec.from_key(spec_key), x)


def cache_append(
    packed: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> None:
    """Implement `quantforge::cache_append` on a GPU, without waiting for it.

    A position on the device is read by the kernel, so a captured graph can be replayed as it grows.
    """
    statistics = statistics_of(shift, equalizer)
    axes = _axes(packed, scales, x, statistics)
    assert axes is not None, "supports() admits no other shapes"
    # under the interpreter the tensors are on the CPU and so is every position
    at = position if position.device == x.device else int(position)
    spec = QuantSpec.from_key(spec_key)
    launch(packed, scales, x, at, statistics, spec, axes, capacity=packed.shape[-2])
