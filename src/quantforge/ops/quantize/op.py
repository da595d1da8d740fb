"""Schema, fake and registration of `quantforge::quantize`."""

from __future__ import annotations

import torch

from quantforge.numerics.packing import packed_width
from quantforge.ops._library import register
from quantforge.ops.quantize import eager
from quantforge.spec import QuantSpec


def fake(
    x: torch.Tensor, shift: torch.Tensor | None, equalizer: torch.Tensor | None, spec_key: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty outputs of the right shape."""
    spec = QuantSpec.from_key(spec_key)
    packed = x.new_empty((*x.shape[:-1], packed_width(spec)), dtype=torch.uint8)
    scale_dtype = getattr(torch, spec.scale_dtype)
    return packed, x.new_empty((*x.shape[:-1], spec.scales_per_vector), dtype=scale_dtype)


quantize = register(
    "quantize(Tensor x, Tensor? shift, Tensor? equalizer, str spec) -> (Tensor, Tensor)",
    fake=fake,
    eager=eager.quantize,
    fast=("triton", "native"),
)
