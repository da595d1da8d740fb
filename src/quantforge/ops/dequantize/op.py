"""Schema, fake and registration of `quantforge::dequantize`."""

from __future__ import annotations

import torch

from quantforge.ops._library import register
from quantforge.ops.dequantize import eager
from quantforge.spec import QuantSpec


def fake(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return an empty output of the right shape."""
    dim = QuantSpec.from_key(spec_key).dim
    return packed.new_empty((*packed.shape[:-1], dim), dtype=dtype)


dequantize = register(
    "dequantize(Tensor packed, Tensor scales, Tensor? shift, Tensor? equalizer, str spec, "
    "ScalarType dtype) -> Tensor",
    fake=fake,
    eager=eager.dequantize,
    fast=("triton", "native"),
)
