"""Appending on the CPU by the native library, straight into the buffers."""

from __future__ import annotations

import torch

from quantforge.ops.quantize import native
from quantforge.spec import QuantSpec


def supports(
    packed: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> str | None:
    """Return why the arguments are not for this backend, or None."""
    if position.device.type != "cpu" or packed.device != x.device:
        return "native kernels run on the CPU"
    if packed.stride(-1) != 1 or scales.stride(-1) != 1:
        return "native kernels write rows that are contiguous"
    start = int(position)
    if start < 0 or start + x.shape[-2] > packed.shape[-2]:
        return "the rows do not fit"  # eager torch raises its error
    return native.supports(x, shift, equalizer, spec_key)


def cache_append(
    packed: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> None:
    """Implement `quantforge::cache_append` on the CPU."""
    rows = (int(position), x.shape[-2])
    targets = packed.narrow(-2, *rows), scales.narrow(-2, *rows)
    native.quantize_into(*targets, x, shift, equalizer, QuantSpec.from_key(spec_key))
    for buffer in (packed, scales):
        if not buffer.is_inference():  # written behind torch's back
            torch.autograd.graph.increment_version(buffer)
