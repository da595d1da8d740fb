"""Public `cache_append`: validation, then the operator."""

from __future__ import annotations

import torch

from quantforge.errors import InputError
from quantforge.ops._library import Impl, run
from quantforge.ops.cache_append import op
from quantforge.ops.checks import (
    check_floating,
    check_last_dim,
    check_packed,
    check_statistic,
    has_values,
)
from quantforge.spec import QuantSpec


def cache_append(
    packed: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    spec: QuantSpec,
    *,
    shift: torch.Tensor | None = None,
    equalizer: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Quantize x into rows `position .. position + n` of preallocated buffers, in place.

    Values are not checked for NaN or infinity: that would wait for the device in every decode
    step. A bad vector gets a scale that is not finite and shows up as NaN, as in a dense cache.

    Args:
        packed: (..., capacity, row_bytes) uint8, written.
        scales: (..., capacity, 1) or (..., capacity, 2), written.
        x: (..., n, dim) float tensor.
        position: int64 scalar tensor, on the CPU or the buffers' device. On the CPU the range is
            checked; on a device that would wait for it: beyond the capacity eager torch fails on
            the device, and the Triton kernel leaves such rows out.
        spec: the code.
        shift: as for `quantize`.
        equalizer: as for `quantize`.
        impl: "auto" takes the fastest backend that supports the call; a named one never falls back.

    Raises:
        InputError: for shapes that do not fit, or rows beyond the capacity.
        UnsupportedError: if a named backend cannot run the call.

    Source: arXiv 2504.19874, Algorithm 1.
    Cost: reads x once, writes `bits / 8` bytes per number.
    """
    check_floating("x", x)
    check_last_dim("x", x, spec.dim)
    check_packed("packed", packed, scales, spec)
    check_statistic("shift", shift, x.shape)
    check_statistic("equalizer", equalizer, x.shape)
    if min(x.ndim, packed.ndim) < 2 or packed.shape[:-2] != x.shape[:-2]:
        raise InputError(
            "x must be (..., n, dim) and packed (..., capacity, bytes) of the same leading axes; "
            f"got {tuple(x.shape)} and {tuple(packed.shape)}"
        )
    _check_position(position)
    if position.device.type == "cpu" and has_values(position):
        start, stop, capacity = int(position), int(position) + x.shape[-2], packed.shape[-2]
        if start < 0 or stop > capacity:
            raise InputError(f"rows {start} to {stop} do not fit into a capacity of {capacity}")
    if impl == "auto":
        op.cache_append(packed, scales, x, position, shift, equalizer, spec.key)
    else:
        run("cache_append", impl, packed, scales, x, position, shift, equalizer, spec.key)


def _check_position(position: object) -> None:
    got = type(position).__name__
    if isinstance(position, torch.Tensor):
        if position.dtype == torch.int64 and position.numel() == 1:
            return
        got = f"{position.dtype} of shape {tuple(position.shape)}"
    raise InputError(
        f"position must be an int64 scalar tensor, so that it may live on the device; got {got}"
    )
