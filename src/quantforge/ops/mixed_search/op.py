"""Schema, fake and registration of `quantforge::mixed_search`."""

from __future__ import annotations

import torch

from quantforge.ops._library import register
from quantforge.ops.mixed_search import eager


def fake(
    query: torch.Tensor,
    packed: list[torch.Tensor],
    scales: torch.Tensor,
    offsets: torch.Tensor,
    base: torch.Tensor,
    rests: torch.Tensor | None,
    steps: torch.Tensor | None,
    ranges: torch.Tensor,
    starts: torch.Tensor,
    visitors: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    lead: int,
    unit: float,
    specs: list[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty outputs of the right shape."""
    return eager.output_like(query, k)


mixed_search = register(
    "mixed_search(Tensor query, Tensor[] packed, Tensor scales, Tensor offsets, Tensor base, "
    "Tensor? rests, Tensor? steps, Tensor ranges, Tensor starts, Tensor? visitors, "
    "Tensor? filter_bitmap, int k, int lead, float unit, str[] specs) -> (Tensor, Tensor)",
    fake=fake,
    eager=eager.mixed_search,
    fast=("triton", "native"),
)
