"""Small models with random weights, and a cache that says what the right answer is."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantforge.llm import QuantForgeCache
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.observe import WatchedTensor
from quantforge.llm.segments import SegmentedTensor
from quantforge.llm.sliding import QuantForgeSlidingLayer

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # the usual 0.02 gives nearly uniform attention, which hides errors
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen3_mixed": {
        "use_sliding_window": True,
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"num_key_value_heads": 4, "head_dim": 16, "original_max_position_embeddings": 1024},
    "gemma2": {
        "sliding_window": 48,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 3.0,  # low enough to bend the logits of random weights
    },
    "gemma3_text": {
        "sliding_window": 48,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neox": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gpt_oss": {
        "sliding_window": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "falcon": {"head_dim": None, "multi_query": True, "parallel_attn": True, "alibi": False},
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        "head_dim": None,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128, "head_dim": None},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
}
"""Models of which some layers are not attention."""
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "head_dim": None,
}
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _LATENT,
    "deepseek_v2": _LATENT,
    "llama4_text": {
        "attention_chunk_size": 48,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
}
SETTINGS: dict[str, Any] = {"sinks": 4, "window": 16, "page_size": 8}
"""Small pages and window, so that short texts fill several pages."""


def config_of(family: str, **changes: Any) -> Any:
    """Return the config of a small model of a family."""
    sizes = SIZES | (FAMILIES | HYBRIDS | OTHERS)[family] | changes
    settings = {k: v for k, v in sizes.items() if (k, v) != ("head_dim", None)}
    return AutoConfig.for_model(family.removesuffix("_mixed"), **settings)


def random_model(family: str, attention: str = "sdpa", **changes: Any) -> Any:
    """Return a model of a family with random float32 weights, the same on every call."""
    torch.manual_seed(0)
    config = config_of(family, **changes)
    config._attn_implementation = attention
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


class _DenseLayer(QuantForgeLayer):
    """Quantizes alike, and hands out dense keys and values decoded from the codes."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*args, **kwargs)
        return tuple(_dense(t) for t in (keys, values))


class _DenseSlidingLayer(_DenseLayer, QuantForgeSlidingLayer):
    """Likewise, of a window."""


def _dense(t: torch.Tensor) -> torch.Tensor:
    if not isinstance(t, SegmentedTensor):
        return t
    dense, see = t.dequantize(), t._see
    return dense if see is None else WatchedTensor.of(dense, see)  # queries decide what to pack


class DenseReferenceCache(QuantForgeCache):
    """What a QuantForgeCache must agree with: the same codes, attended to by torch itself."""

    def _new_layer(self, index: int) -> QuantForgeLayer:
        return _DenseLayer(self.overrides.get(index, self.options))

    def _new_sliding_layer(self, index: int, window: int) -> QuantForgeSlidingLayer:
        return _DenseSlidingLayer(self.overrides.get(index, self.options), window)
