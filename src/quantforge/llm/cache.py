"""`QuantForgeCache`: a transformers cache that keeps keys and values packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    get_layer_types_and_kwargs,
)

from quantforge.errors import ConfigError
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig


class QuantForgeCache(DynamicCache):
    """A drop-in KV cache: `model.generate(..., past_key_values=QuantForgeCache())`.

    Each layer keeps `[ sinks | packed pages | recent window ]`: the first and the latest tokens in
    the model's dtype, the rest in a few bits. Attention reads the codes; the history is never
    decoded in full. Works with `attn_implementation="sdpa"` and `"eager"`.

    Args:
        config: the model's config. Needed for models with layers other than full attention:
            sliding-window, linear and other layers then get transformers' own (unquantized)
            cache layer. Without it every layer is a quantized full-attention layer, which is
            correct for sliding-window models too, but holds more tokens than they need.
        layers: settings that differ in single layers: {layer index: {setting: value}}.
        **settings: see `CacheConfig`: bits, sinks, window, page_size, shift, equalizer, ...

    Raises:
        ConfigError: for unknown settings or values out of range.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        layers: Mapping[int, Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        self.options = _configured(CacheConfig(), settings)
        self.overrides = {int(i): _configured(self.options, s) for i, s in (layers or {}).items()}
        Cache.__init__(self, layers=[] if config is None else self._layers_of(config))

    def _layers_of(self, config: Any) -> list[Any]:
        types, kwargs = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        # one dict for all layers before transformers 5.20
        per_layer = kwargs if isinstance(kwargs, list) else [kwargs] * len(types)
        return [
            self._new_layer(index)
            if kind == "full_attention"
            else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs)
            for index, (kind, kwargs) in enumerate(zip(types, per_layer, strict=True))
        ]

    def _new_layer(self, index: int) -> QuantForgeLayer:
        return QuantForgeLayer(self.overrides.get(index, self.options))

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, Hkv, q, dim) of a layer; return all to attend to."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers, windows, scales and unquantized layers included."""
        return sum(_layer_bytes(layer) for layer in self.layers)


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, QuantForgeLayer):
        return layer.nbytes
    tensors = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _configured(base: CacheConfig, settings: Mapping[str, Any]) -> CacheConfig:
    known = {f.name for f in dataclasses.fields(CacheConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(f"unknown cache settings {unknown}; known are {sorted(known)}")
    return dataclasses.replace(base, **settings)
