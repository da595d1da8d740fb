"""Schema, fake and registration of `quantforge::combine`."""

from __future__ import annotations

import torch

from quantforge.ops._library import register
from quantforge.ops.combine import eager
from quantforge.spec import QuantSpec


def fake(
    weights: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> torch.Tensor:
    """Return an empty output of the right shape."""
    return eager.output_like(weights, packed, QuantSpec.from_key(spec_key).dim)


combine = register(
    "combine(Tensor weights, Tensor packed, Tensor scales, Tensor? shift, Tensor? equalizer, "
    "str spec) -> Tensor",
    fake=fake,
    eager=eager.combine,
    fast=("triton", "native"),
)
