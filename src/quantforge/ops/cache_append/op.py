"""Schema, fake and registration of `quantforge::cache_append`."""

from __future__ import annotations

import torch

from quantforge.ops._library import register
from quantforge.ops.cache_append import eager


def fake(
    packed: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> None:
    """Return nothing: the operator writes into packed and scales."""


cache_append = register(
    "cache_append(Tensor(a!) packed, Tensor(b!) scales, Tensor x, Tensor position, "
    "Tensor? shift, Tensor? equalizer, str spec) -> ()",
    fake=fake,
    eager=eager.cache_append,
    fast=("triton", "native"),
)
