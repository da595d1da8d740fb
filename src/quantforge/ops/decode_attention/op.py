"""Schema, fake and registration of `quantforge::decode_attention`."""

from __future__ import annotations

from typing import Any

import torch

from quantforge.ops._library import register
from quantforge.ops.decode_attention import eager
from quantforge.spec import QuantSpec


def fake(query: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty outputs of the right shape."""
    lead, value_dim = query.shape[:-1], QuantSpec.from_key(args[-1]).dim
    return query.new_empty((*lead, value_dim)), query.new_empty(lead, dtype=torch.float32)


decode_attention = register(
    "decode_attention(Tensor query, Tensor k_pages, Tensor v_pages, Tensor? page_table, "
    "Tensor? seqlens, SymInt n_tokens, Tensor? starts, Tensor? k_dense, Tensor? v_dense, "
    "Tensor? dense_lens, SymInt n_dense, SymInt n_sinks, Tensor? mask, "
    "bool is_causal, Tensor? k_shift, Tensor? k_equalizer, "
    "Tensor? v_shift, Tensor? v_equalizer, float scale, float softcap, SymInt window, str k_spec, "
    "str v_spec) -> (Tensor, Tensor)",
    fake=fake,
    eager=eager.decode_attention,
    fast=("triton",),
)
