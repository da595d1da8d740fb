"""Public `dequantize`: validation, then the operator."""

from __future__ import annotations

import torch

from quantforge.ops._library import Impl, run
from quantforge.ops.checks import check_packed, check_statistic
from quantforge.ops.dequantize import op
from quantforge.spec import QuantSpec


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    spec: QuantSpec,
    *,
    shift: torch.Tensor | None = None,
    equalizer: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Decode vectors: `shift + equalizer * R^T (scale * centroids[codes])`.

    Args:
        packed: (..., row_bytes) uint8, as `quantize` returns it.
        scales: (..., 1) or (..., 2) in the spec's scale dtype.
        spec: the code.
        shift: as given to `quantize`.
        equalizer: as given to `quantize`.
        dtype: of the result; computed in float32.
        impl: "auto" takes the fastest backend that supports the call; a named one never falls back.

    Returns:
        (..., dim) tensor.

    Raises:
        InputError: for shapes that do not belong to the spec.
        UnsupportedError: if a named backend cannot run the call.

    Source: arXiv 2504.19874, Algorithms 1 and 2 (DeQuant).
    Cost: reads `bits / 8` bytes per number, writes one number each.
    """
    check_packed("packed", packed, scales, spec)
    shape = torch.Size((*packed.shape[:-1], spec.dim))
    check_statistic("shift", shift, shape)
    check_statistic("equalizer", equalizer, shape)
    if impl == "auto":
        return op.dequantize(packed, scales, shift, equalizer, spec.key, dtype)
    return run("dequantize", impl, packed, scales, shift, equalizer, spec.key, dtype)
