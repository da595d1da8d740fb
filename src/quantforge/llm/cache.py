"""`QuantForgeCache`: a transformers cache that keeps keys and values packed."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    get_layer_types_and_kwargs,
)

from quantforge import settings as settings_file
from quantforge.errors import ConfigError, UnsupportedError
from quantforge.llm.latent import LatentLayer
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig
from quantforge.llm.parallel import HeadShard, head_shard
from quantforge.llm.presets import preset_settings
from quantforge.llm.prompt_cache import PromptCache
from quantforge.llm.report import CacheReport, report
from quantforge.llm.saved_settings import checked_settings
from quantforge.llm.sliding import QuantForgeSlidingLayer
from quantforge.llm.static import QuantForgeStaticLayer
from quantforge.llm.static_sliding import QuantForgeStaticSlidingLayer

SLIDING = ("sliding_attention", "chunked_attention")


class QuantForgeCache(PromptCache, DynamicCache):
    """A drop-in KV cache: `model.generate(..., past_key_values=QuantForgeCache())`.

    Each layer keeps `[ sinks | packed pages | recent window ]`: the first and the latest tokens in
    the model's dtype, the rest in a few bits. Attention reads the codes; the history is never
    decoded in full. Works with `attn_implementation="quantforge"`, `"sdpa"` and `"eager"`.

    Args:
        config: the model's config. Layers of full and of sliding-window attention are quantized,
            others (linear attention, convolutions) get transformers' own cache layer. Without a
            config every layer is a quantized full-attention layer, which is correct for
            sliding-window models too, but holds more tokens than they need.
            Under tensor parallelism it tells which key heads this rank holds.
            Or the name of a preset: `QuantForgeCache("small")`.
        preset: "quality", "balanced" or "small": settings to begin with, see `PRESETS`.
        layers: settings that differ in single layers: {layer index: {setting: value}}.
        max_cache_len: room for so many tokens, allocated at once, with lengths on the device: for
            `torch.compile` and CUDA graphs, which `generate()` then uses by itself on a GPU. Layers
            other than attention are transformers' own static ones.
        offloading: keep all layers but the one at work on the CPU (needs a GPU).
        offload_only_non_sliding: but leave sliding-window layers, which are small, where they are.
        **settings: see `CacheConfig`: bits, sinks, window, page_size, shift, equalizer, ...

    Raises:
        ConfigError: for unknown settings or values out of range, and if the ranks of tensor
            parallelism cannot hold equally many key heads.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        preset: str | None = None,
        layers: Mapping[int, Mapping[str, Any]] | None = None,
        max_cache_len: int | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        **settings: Any,
    ) -> None:
        if isinstance(config, str):
            config, preset = None, config
        base = {} if preset is None else preset_settings(preset)
        self.options = _configured(CacheConfig(), base | settings)
        self.overrides = {int(i): _configured(self.options, s) for i, s in (layers or {}).items()}
        self._max_cache_len = max_cache_len
        if max_cache_len is not None and offloading:
            raise ConfigError("a cache with max_cache_len has fixed addresses; it cannot offload")
        used = (self.options, *self.overrides.values())
        if max_cache_len is not None and any(
            o.importance or o.head_bits or o.outlier_bits is not None for o in used
        ):
            raise ConfigError(
                "importance, head_bits and outlier_bits belong to caches that grow; leave out "
                "max_cache_len, or them"
            )
        if (shard := head_shard(config)) is not None:
            self._name_heads(shard)
        self._config = None if config is None else config.get_text_config(decoder=True)
        Cache.__init__(
            self,
            layers=[] if config is None else self._layers_of(self._config),
            offloading=offloading,
            offload_only_non_sliding=offload_only_non_sliding,
        )

    @classmethod
    def from_file(
        cls, path: str | PathLike[str], config: Any = None, **settings: Any
    ) -> QuantForgeCache:
        """Make an empty cache with the section "cache" of a file of settings.

        Args:
            path: of the JSON file, such as `quantforge optimize` writes.
            config: the model's config.
            **settings: what to change of the file's.

        Raises:
            FormatError: for a file of another kind or of a later version.
            ConfigError: for a bad setting, with its name.
        """
        return settings_file.read(
            path, "cache", lambda values: cls(config, **checked_settings(values) | settings)
        )

    def _layers_of(self, config: Any) -> list[Any]:
        types, kwargs = get_layer_types_and_kwargs(config)
        # one dict for all layers before transformers 5.20
        per_layer = kwargs if isinstance(kwargs, list) else [kwargs] * len(types)
        layers: list[Any] = []
        for index, (kind, settings) in enumerate(zip(types, per_layer, strict=True)):
            if kind == "full_attention":
                layers.append(self._new_layer(index))
            elif kind in SLIDING:
                layers.append(self._new_sliding_layer(index, settings["sliding_window"]))
            elif self._max_cache_len is not None:
                static = STATIC_LAYER_TYPE_MAPPING[kind]
                layers.append(static(max_cache_len=self._max_cache_len, **settings))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**settings))
        return layers

    def _name_heads(self, shard: HeadShard) -> None:
        """Name heads with bits of their own as this rank numbers them."""

        def held(options: CacheConfig) -> CacheConfig:
            return dataclasses.replace(options, head_bits=shard.local(options.head_bits))

        self.options = held(self.options)
        self.overrides = {i: held(options) for i, options in self.overrides.items()}

    def _options_of(self, index: int) -> CacheConfig:
        return self.overrides.get(index, self.options)

    def _new_layer(self, index: int) -> QuantForgeLayer:
        if self._max_cache_len is not None:
            return QuantForgeStaticLayer(self._options_of(index), self._max_cache_len)
        rank = getattr(self._config, "kv_lora_rank", None)
        if rank is not None:
            return LatentLayer(self._options_of(index), rank)
        return QuantForgeLayer(self._options_of(index))

    def _new_sliding_layer(self, index: int, window: int) -> QuantForgeLayer:
        if self._max_cache_len is not None:
            options = self._options_of(index)
            return QuantForgeStaticSlidingLayer(options, self._max_cache_len, window)
        return QuantForgeSlidingLayer(self._options_of(index), window)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, Hkv, q, dim) of a layer; return all to attend to.

        Raises:
            InputError: if they do not fit what the layer holds.
            UnsupportedError: if the model's attention function can only read dense tensors.
        """
        config = self._config
        if config is None and not self.layers and not torch.compiler.is_compiling():
            # nobody tells a cache without a config how it is attended to, but who calls it knows
            config = getattr(sys._getframe(1).f_locals.get("self"), "config", None)
            self._check_shard(config)
        _check_attention(getattr(config, "_attn_implementation", None))
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_shard(self, config: Any) -> None:
        named = any(options.head_bits for options in (self.options, *self.overrides.values()))
        if named and head_shard(config) is not None:
            raise ConfigError(
                "head_bits names heads of the whole model, and this rank holds some of them: use "
                "QuantForgeCache(config=model.config), which knows which"
            )

    @property
    def is_compileable(self) -> bool:
        """Whether a step may be compiled, also before the first one makes the layers."""
        if not self.layers:
            return self._max_cache_len is not None
        return all(layer.is_compileable for layer in self.layers)

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Return whether a layer of linear attention has seen tokens."""
        self._check_linear(layer_idx)
        more = () if state_idx is None else (state_idx,)
        return super().has_previous_state(layer_idx, *more)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the convolution state of a layer of linear attention."""
        self._check_linear(layer_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Update the convolution state of a layer of linear attention, and return it."""
        self._check_linear(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def _check_linear(self, index: int | None) -> None:
        if self._config is None and index is not None:
            raise ConfigError(
                f"layer {index} of this model is not attention, so the cache must know its layers: "
                "use QuantForgeCache(config=model.config)"
            )

    def to(self, device: torch.device | str | None) -> QuantForgeCache:
        """Move all layers to a device, in place; return the cache.

        None, which accelerate's hooks pass where a module has no device, leaves them.
        """
        if device is None:
            return self
        for layer in self.layers:
            if isinstance(layer, QuantForgeLayer):
                layer.to(device)
            else:
                _move(layer, torch.device(device))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantForgeCache:
        """Copy all but the model's config, which stays that of the model."""
        twin = copy.copy(self)
        memo |= {id(self): twin, id(self._config): self._config}
        vars(twin).update({name: copy.deepcopy(x, memo) for name, x in vars(self).items()})
        return twin

    def report(self) -> CacheReport:
        """Return what each layer holds and did: bits, bytes, outlier scores; print it for a table.

        Waits for the device.
        """
        return report(self.layers, [_layer_bytes(layer) for layer in self.layers])

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers, windows, scales and unquantized layers included."""
        return sum(_layer_bytes(layer) for layer in self.layers)


def _check_attention(name: str | None) -> None:
    if name is not None and any(kind in name for kind in ("flash", "flex", "paged")):
        raise UnsupportedError(
            f'attn_implementation="{name}" reads dense keys and values only, and a QuantForgeCache '
            'holds packed ones; call model.set_attn_implementation("quantforge"), which is '
            'fastest, or "sdpa" or "eager"'
        )


def _tensors(layer: Any) -> dict[str, torch.Tensor]:
    return {name: t for name, t in vars(layer).items() if isinstance(t, torch.Tensor)}


def _move(layer: Any, device: torch.device) -> None:
    """Move a layer of transformers: its tensors, its dicts of states, and where it expects them."""
    for name, t in _tensors(layer).items():
        setattr(layer, name, t.to(device))
    for states in vars(layer).values():
        if isinstance(states, dict):
            moved = {i: t.to(device) for i, t in states.items() if isinstance(t, torch.Tensor)}
            states.update(moved)
    if hasattr(layer, "device"):
        layer.device = device


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, QuantForgeLayer):
        return layer.nbytes
    tensors = list(_tensors(layer).values())
    for states in vars(layer).values():
        if isinstance(states, dict):
            tensors += [t for t in states.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _configured(base: CacheConfig, settings: Mapping[str, Any]) -> CacheConfig:
    known = {f.name for f in dataclasses.fields(CacheConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(f"unknown cache settings {unknown}; known are {sorted(known)}")
    return dataclasses.replace(base, **settings)
