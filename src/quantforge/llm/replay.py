"""A prompt that a model reads once, to fill caches of many settings with.

A first prefill attends exactly, whatever the cache, so its keys, values and queries are the same
for all of them: measuring another cache need not run the prompt again.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from quantforge.errors import ConfigError
from quantforge.llm.cache import QuantForgeCache
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.observe import WatchedTensor

Seen = tuple[torch.Tensor, float | None, torch.Tensor | None]


class RecordedPrompt:
    """Keys, values and queries of a prompt.

    Args:
        model: a transformers causal language model.
        input_ids: (B, n) tokens without padding.

    Cost: one forward pass; holds keys, values and queries of all layers.
    """

    def __init__(self, model: Any, input_ids: torch.Tensor) -> None:
        self._model, self._input_ids = model, input_ids
        recorder = _Recorder(config=model.config)
        self._own: DynamicCache | None = recorder
        self._read(recorder)
        self._layers = recorder.stop()

    def _read(self, cache: Any) -> None:
        with torch.no_grad():
            self._model(self._input_ids, past_key_values=cache, logits_to_keep=1)

    def own(self) -> DynamicCache:
        """Return the model's own cache after the prompt.

        Cost: nothing the first time; one more forward pass each time after it.
        """
        cache, self._own = self._own, None
        if cache is None:
            cache = DynamicCache(config=self._model.config)
            self._read(cache)
        return cache

    @property
    def shapes(self) -> dict[int, tuple[torch.Size, torch.Size]]:
        """Shapes (B, Hkv, n, dim) of the keys and values of each layer that has them."""
        return {i: (k.shape, v.shape) for i, (k, v, _) in self._layers.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return next(iter(self._layers.values()))[0].dtype

    def fill(self, cache: QuantForgeCache) -> None:
        """Fill an empty cache, made for the model's config, with the prompt.

        Layers that are not quantized (linear attention) keep states that only the model can make;
        with one of them the model reads the prompt again.

        Raises:
            ConfigError: if the cache was not made for the model's config.
        """
        if not cache.layers:
            raise ConfigError(
                "the cache does not know its layers; use QuantForgeCache(model.config)"
            )
        if not all(isinstance(layer, QuantForgeLayer) for layer in cache.layers):
            self._read(cache)
            return
        for index, (keys, values, seen) in self._layers.items():
            cache.update(keys, values, index)
            for query, scale, mask in seen:
                cache.layers[index]._see(query, scale, mask)


class _Recorder(DynamicCache):
    """The model's own cache, which notes what goes into it until `stop`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recorded: dict[int, tuple[torch.Tensor, torch.Tensor, list[Seen]]] | None = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int,
        *args: Any, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._recorded is None:
            return keys, values
        seen: list[Seen] = []
        self._recorded[layer_idx] = (key_states, value_states, seen)
        return WatchedTensor.of(keys, lambda *what: seen.append(what)), values

    def stop(self) -> dict[int, tuple[torch.Tensor, torch.Tensor, list[Seen]]]:
        """Return what was noted, and note no more."""
        recorded, self._recorded = self._recorded, None
        assert recorded is not None, "stopped once"
        return recorded
