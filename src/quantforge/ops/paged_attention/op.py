"""Schema, fake and registration of `quantforge::paged_attention`."""

from __future__ import annotations

from typing import Any

import torch

from quantforge.ops._library import register
from quantforge.ops.paged_attention import eager
from quantforge.spec import QuantSpec


def fake(query: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty outputs of the right shape."""
    lead, value_dim = query.shape[:-1], QuantSpec.from_key(args[-1]).dim
    return (
        query.new_empty((*lead, value_dim), dtype=torch.float32),
        query.new_empty(lead, dtype=torch.float32),
    )


paged_attention = register(
    "paged_attention(Tensor query, Tensor k_packed, Tensor k_scales, Tensor? k_shift, "
    "Tensor? k_equalizer, Tensor v_packed, Tensor v_scales, Tensor? v_shift, "
    "Tensor? v_equalizer, Tensor page_table, Tensor seqlens, SymInt n_tokens, float scale, "
    "str k_spec, str v_spec) -> (Tensor, Tensor)",
    fake=fake,
    eager=eager.paged_attention,
    fast=("triton",),
)
