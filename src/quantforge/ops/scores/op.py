"""Schema, fake and registration of `quantforge::scores`."""

from __future__ import annotations

import torch

from quantforge.ops._library import register
from quantforge.ops.scores import eager


def fake(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
    precision: str = "exact",
) -> torch.Tensor:
    """Return an empty output of the right shape."""
    return eager.output_like(query, packed)


scores = register(
    "scores(Tensor query, Tensor packed, Tensor scales, Tensor? shift, Tensor? equalizer, "
    'str spec, str precision="exact") -> Tensor',
    fake=fake,
    eager=eager.scores,
    fast=("triton", "native"),
)
