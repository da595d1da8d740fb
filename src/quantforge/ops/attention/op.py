"""Schema, fake and registration of `quantforge::attention`."""

from __future__ import annotations

import torch

from quantforge.ops._library import register
from quantforge.ops.attention import eager
from quantforge.spec import QuantSpec


def fake(
    query: torch.Tensor,
    k_packed: torch.Tensor,
    k_scales: torch.Tensor,
    k_shift: torch.Tensor | None,
    k_equalizer: torch.Tensor | None,
    v_packed: torch.Tensor,
    v_scales: torch.Tensor,
    v_shift: torch.Tensor | None,
    v_equalizer: torch.Tensor | None,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    k_spec_key: str,
    v_spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty outputs of the right shape."""
    lead = query.shape[:-1]
    value_dim = QuantSpec.from_key(v_spec_key).dim
    return (
        query.new_empty((*lead, value_dim), dtype=torch.float32),
        query.new_empty(lead, dtype=torch.float32),
    )


attention = register(
    "attention(Tensor query, Tensor k_packed, Tensor k_scales, Tensor? k_shift, "
    "Tensor? k_equalizer, Tensor v_packed, Tensor v_scales, Tensor? v_shift, "
    "Tensor? v_equalizer, Tensor? mask, bool is_causal, float scale, str k_spec, str v_spec) "
    "-> (Tensor, Tensor)",
    fake=fake,
    eager=eager.attention,
    fast=("triton", "native"),
)
