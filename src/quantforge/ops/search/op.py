"""Schema, fake and registration of `quantforge::search`."""

from __future__ import annotations

import torch

from quantforge.ops._library import register
from quantforge.ops.search import eager


def fake(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty outputs of the right shape."""
    return eager.output_like(query, k)


search = register(
    "search(Tensor query, Tensor packed, Tensor scales, Tensor? shift, Tensor? equalizer, "
    "Tensor? filter_bitmap, int k, str spec) -> (Tensor, Tensor)",
    fake=fake,
    eager=eager.search,
    fast=("triton", "native"),
)
