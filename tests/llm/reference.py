"""A cache that merely fake-quantizes: what a QuantForgeCache must agree with.

Dense tensors, in which old tokens are replaced by what their codes stand for, on the same schedule.
It shares no storage code with the cache: keys and values are concatenated, sliced and indexed as
transformers' own layers do.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from quantforge.llm.options import CacheConfig
from quantforge.ops.dequantize.api import dequantize
from quantforge.ops.quantize.api import quantize
from quantforge.spec import QuantSpec


class FakeQuantLayer(CacheLayerMixin):
    """Dense keys and values; tokens that have left the window carry their quantization error.

    Args:
        options: of the cache; without the equalizer, which depends on queries.
        window: of sliding attention, or None.
    """

    is_croppable = True

    def __init__(self, options: CacheConfig, window: int | None = None) -> None:
        super().__init__()
        assert not options.equalizer
        self.options, self.window = options, window
        self.is_sliding = window is not None
        self.sinks = 0 if self.is_sliding else options.sinks
        self.keep = None if window is None else window - 1
        self.packs = self.keep is None or self.keep >= options.window + options.page_size
        self.record_past = False
        self.seen = self.n_packed = 0
        self.shifts: list[torch.Tensor] = []

    def activate_past_recording(self) -> None:
        self.record_past = self.is_sliding

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        n = self.keys.shape[2]
        first = 0 if self.keep is None else max(n - self.keep - key_states.shape[2], 0)
        visible = self.keys[:, :, first:], self.values[:, :, first:]
        if not self.record_past:
            self._forget()
        self._pack()
        return visible

    def _forget(self) -> None:
        if self.keep is not None:
            gone = max(self.keys.shape[2] - self.keep, 0)
            self.keys, self.values = self.keys[:, :, gone:], self.values[:, :, gone:]
            self.n_packed = max(self.n_packed - gone, 0)

    def _pack(self) -> None:
        options = self.options
        n_dense = self.keys.shape[2] - self.n_packed
        sinks = min(self.sinks, n_dense)
        pages = max(n_dense - sinks - options.window, 0) // options.page_size
        if not pages or not self.packs:
            return
        start = sinks + self.n_packed
        stop = start + pages * options.page_size
        if self.n_packed == 0:
            self.shifts = [
                x[:, :, start:].float().mean(2, keepdim=True) for x in (self.keys, self.values)
            ]
        specs = (
            options.key_spec(self.keys.shape[-1]),
            options.value_spec(self.values.shape[-1]),
        )
        self.keys, self.values = (
            torch.cat(
                [x[:, :, :start], self._decoded(x[:, :, start:stop], *how), x[:, :, stop:]], 2
            )
            for x, how in zip(
                (self.keys, self.values), zip(specs, self.shifts, strict=True), strict=True
            )
        )
        self.n_packed += stop - start

    def _decoded(self, x: torch.Tensor, spec: QuantSpec, shift: torch.Tensor) -> torch.Tensor:
        shift = shift if self.options.shift else None
        codes = quantize(x, spec, shift=shift)
        return dequantize(*codes, spec, shift=shift, dtype=x.dtype)

    def crop(self, tokens_to_remove: int) -> None:
        tokens = -int(tokens_to_remove)
        n = self.keys.shape[2] - tokens
        n_dense = self.keys.shape[2] - self.n_packed
        recent = n_dense - min(self.sinks, n_dense)
        self.n_packed = max(self.n_packed - max(tokens - recent, 0), 0)
        self.keys, self.values = self.keys[:, :, :n], self.values[:, :, :n]
        self.seen -= tokens
        self._forget()

    def _index(self, indices: torch.Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]
        self.shifts = [shift[indices] for shift in self.shifts]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._index(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._index(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._index(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.seen if self.keep is None else min(self.seen, self.keep)
        return held + query_length, self.seen - held

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    get_max_cache_shape = get_max_length


class FakeQuantCache(DynamicCache):
    """A cache of such layers; arguments as those of a `QuantForgeCache`."""

    def __init__(self, config: Any = None, **settings: Any) -> None:
        self.options = CacheConfig(**settings)
        layers: list[Any] = []
        if config is not None:
            types, kwargs = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
            per_layer = kwargs if isinstance(kwargs, list) else [kwargs] * len(types)
            for kind, more in zip(types, per_layer, strict=True):
                if kind == "full_attention":
                    layers.append(FakeQuantLayer(self.options))
                elif kind in ("sliding_attention", "chunked_attention"):
                    layers.append(FakeQuantLayer(self.options, more["sliding_window"]))
                else:
                    layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**more))
        Cache.__init__(self, layers=layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(FakeQuantLayer(self.options))
        return super().update(key_states, value_states, layer_idx, *args)
