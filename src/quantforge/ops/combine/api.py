"""Public `combine`: validation, then the operator."""

from __future__ import annotations

import torch

from quantforge.ops._library import Impl, run
from quantforge.ops.checks import (
    check_batch,
    check_floating,
    check_last_dim,
    check_packed,
    check_statistic,
)
from quantforge.ops.combine import op
from quantforge.spec import QuantSpec


def combine(
    weights: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    spec: QuantSpec,
    *,
    shift: torch.Tensor | None = None,
    equalizer: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Add up packed vectors with weights: `weights @ X`, X never decoded in full.

    Args:
        weights: (..., q, n) float tensor.
        packed: (..., n, row_bytes) uint8; leading axes broadcast against those of weights.
        scales: (..., n, 1) or (..., n, 2).
        spec: the code.
        shift: as given to `quantize`.
        equalizer: as given to `quantize`.
        impl: "auto" takes the fastest backend that supports the call; a named one never falls back.

    Returns:
        (..., q, dim) in the dtype of weights, accumulated in float32.

    Raises:
        InputError: for shapes that do not fit.
        UnsupportedError: if a named backend cannot run the call.

    Source: arXiv 2504.19874, Algorithm 1; rotation is linear, so it is undone once per sum.
    Cost: reads `bits / 8` bytes per number, once for all weights.
    """
    check_floating("weights", weights)
    check_packed("packed", packed, scales, spec)
    check_batch("weights", weights, "packed", packed)
    check_last_dim("weights", weights, packed.shape[-2])
    shape = torch.Size((*packed.shape[:-1], spec.dim))
    check_statistic("shift", shift, shape)
    check_statistic("equalizer", equalizer, shape)
    arguments = (weights, packed, scales, shift, equalizer, spec.key)
    return op.combine(*arguments) if impl == "auto" else run("combine", impl, *arguments)
