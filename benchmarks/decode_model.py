"""A Llama with random weights, the caches to compare, and what they have to read in a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.cases.inputs import normal, row_nbytes
from quantforge import QuantForgeCache
from quantforge.llm.options import CacheConfig

LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 1 << 18,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SMALL: dict[str, Any] = LLAMA_3_8B | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 100,
}
CACHES = {
    "dynamic": 16,
    "static": 16,
    "quantforge4": 4,
    "quantforge4-static": 4,
    "quantforge2": 2,
    "quantforge2-static": 2,
}
"""Caches to compare, and their bits."""
FILL_BYTES = 256 << 20
"""Bytes of keys that are written into the cache at once."""


def random_model(sizes: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Return a Llama with normal weights, made on the device."""
    config = LlamaConfig(**sizes)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model = model.to(device).eval().requires_grad_(False)  # a dtype would round the RoPE table
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02, generator=generator)
    return model


def make_cache(kind: str, config: Any, tokens: int) -> Any:
    """Return an empty cache with room for `tokens` where that is fixed."""
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=tokens)
    if is_static(kind):
        return QuantForgeCache(config=config, max_cache_len=tokens, bits=CACHES[kind])
    return QuantForgeCache(bits=CACHES[kind])


def is_static(kind: str) -> bool:
    """Return whether a cache has fixed buffers, so that its step is compiled."""
    return kind.endswith("static")


def fill(cache: Any, kind: str, config: Any, batch: int, tokens: int, like: torch.Tensor) -> None:
    """Write random keys and values of `tokens` tokens into every layer, without the model.

    Chunks bound what quantizing needs. A dynamic cache takes a layer at once, since it copies all
    it holds with every chunk.
    """
    heads, dim = config.num_key_value_heads, config.head_dim
    per_token = batch * heads * dim * like.element_size()
    chunk = tokens if kind == "dynamic" else max(1, min(tokens, FILL_BYTES // per_token))
    for layer in range(config.num_hidden_layers):
        for start in range(0, tokens, chunk):
            shape = (batch, heads, min(chunk, tokens - start), dim)
            seed = 2 * (layer * tokens + start)
            key, value = (normal(shape, like.dtype, like.device, seed + i) for i in range(2))
            cache.update(key, value, layer)
        if kind.startswith("quantforge") and is_static(kind):
            assert cache.layers[layer].keys is not None  # nobody attended: pack what waits for it


@dataclass(frozen=True)
class StepBytes:
    """What a decode step cannot avoid reading.

    Attributes:
        weights: parameters, of the embedding only the rows of the batch.
        cache: keys and values of all sequences.
    """

    weights: int
    cache: int

    def floor_ms(self, read_gbps: float) -> float:
        """Return the time of reading them once."""
        return (self.weights + self.cache) / read_gbps / 1e6


def step_bytes(model: Any, kind: str, batch: int, tokens: int) -> StepBytes:
    """Return the bytes of a step with `tokens` tokens in the cache."""
    config, dtype = model.config, next(model.parameters()).dtype
    embedding = model.get_input_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tied = model.get_output_embeddings().weight is embedding
    skipped = 0 if tied else embedding.shape[0] - batch
    weights -= skipped * embedding.shape[1] * embedding.element_size()
    heads = batch * config.num_hidden_layers * config.num_key_value_heads
    return StepBytes(weights, heads * _head_bytes(kind, config.head_dim, tokens, dtype))


def _head_bytes(kind: str, dim: int, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of one head."""
    dense_row = 2 * dim * dtype.itemsize
    if not kind.startswith("quantforge"):
        return tokens * dense_row
    options = CacheConfig(bits=CACHES[kind])
    left = max(0, tokens - options.sinks - options.window)
    page = options.page_size
    if is_static(kind) and options.bits != 4:
        page = 128  # it packs whole pages, and waits until the next token finds no room
    packed = left // page * page
    row = row_nbytes(options.key_spec(dim)) + row_nbytes(options.value_spec(dim))
    return packed * row + (tokens - packed) * dense_row


def needed_bytes(model: Any, kind: str, batch: int, tokens: int) -> int:
    """Return an estimate of the peak memory of a step beyond the weights.

    A dynamic cache copies a layer when it appends. The static one repeats keys and values for all
    query heads under its mask. Packed buffers may have grown by an eighth more than they need, and
    quantizing takes about 16 times its chunk.
    """
    config = model.config
    held = step_bytes(model, kind, batch, tokens).cache
    layer = held // config.num_hidden_layers
    repeats = config.num_attention_heads // config.num_key_value_heads
    if kind == "dynamic":
        extra = 2 * layer
    elif kind == "static":
        extra = 2 * repeats * layer
    else:
        chunk = batch * config.num_key_value_heads * tokens * config.head_dim * 2
        extra = held // 8 + 2 * layer + 16 * min(FILL_BYTES, chunk)
    logits = batch * config.vocab_size * 4
    return held + extra + 4 * logits
