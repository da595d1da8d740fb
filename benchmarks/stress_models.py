"""Versions of a Llama that compute (nearly) the same function but break naive KV quantization."""

from __future__ import annotations

import copy
from typing import Any

import torch


def with_outlier_channels(model: Any, *, gain: float = 30.0, pairs: int = 4, seed: int = 0) -> Any:
    """Return a copy whose keys and values have loud channels; the function is unchanged.

    Some RoPE pairs of K are scaled by `gain` and the same pairs of Q by its inverse; as many
    channels of V, and the columns of the output projection that read them, likewise.
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    config = model.config
    dim, kv_heads = config.head_dim, config.num_key_value_heads
    groups = config.num_attention_heads // kv_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for head in range(kv_heads):
                chosen = torch.randperm(dim // 2, generator=generator)[:pairs]
                channels = torch.cat([chosen, chosen + dim // 2])
                attention.k_proj.weight[head * dim + channels] *= gain
                attention.v_proj.weight[head * dim + channels] *= gain
                for query_head in range(head * groups, (head + 1) * groups):
                    attention.q_proj.weight[query_head * dim + channels] /= gain
                    attention.o_proj.weight[:, query_head * dim + channels] /= gain
    return model


def with_key_bias(model: Any, *, norm: float = 27.0, pairs: int = 4, seed: int = 0) -> Any:
    """Return a copy with a constant key bias, `norm` times the size of a typical key.

    The bias lies in the slowest RoPE pairs, which hardly turn within the context, so it shifts
    all logits of a query nearly alike. k_proj biases of the Qwen2 family reach 605 to 921 where
    the median is 22 (llama.cpp issue 21385).
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    config = model.config
    dim, kv_heads = config.head_dim, config.num_key_value_heads
    slow = torch.arange(dim // 2 - pairs, dim // 2)
    channels = torch.cat([slow, slow + dim // 2])
    with torch.no_grad():
        for layer in model.model.layers:
            projection = layer.self_attn.k_proj
            # after RMSNorm an input has about one unit per channel, times the norm's weight
            scale = layer.input_layernorm.weight.float()
            key_norm = (projection.weight.float() * scale).norm() / kv_heads**0.5
            bias = torch.zeros(kv_heads, dim)
            directions = torch.randn(kv_heads, len(channels), generator=generator)
            bias[:, channels] = directions / directions.norm(dim=-1, keepdim=True) * norm * key_norm
            projection.bias = torch.nn.Parameter(bias.flatten().to(projection.weight.dtype))
    return model
