"""Shifts and equalizers for all prompts, measured once in transformers.

A `QuantForgeCache` measures them on each prompt. vLLM shares blocks between prompts, so there they
have to be the same for all: those of a sample of text. Without them keys with a large bias (Qwen2)
or loud channels lose more than they need to.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantforge.errors import FormatError, InputError
from quantforge.vllm.pages import Statistics

FORMAT = "quantforge-vllm-statistics-1"


def measure_statistics(model: Any, input_ids: torch.Tensor, path: str | PathLike[str]) -> None:
    """Write the shifts and equalizers of a sample's keys, values and queries.

    Args:
        model: a causal model of transformers.
        input_ids: (1, n) int64, some thousand tokens of the kind that will be served.
        path: safetensors file for `Settings(statistics=...)`.

    Raises:
        InputError: for fewer than 2 tokens, or layers that keep no keys and values of all tokens.
    """
    from quantforge.llm.cache import QuantForgeCache

    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise InputError(f"input_ids must be (1, n) with n >= 2; got {tuple(input_ids.shape)}")
    cache = QuantForgeCache(sinks=0, window=0, page_size=1, layout="rows")
    with torch.inference_mode():
        model(input_ids, past_key_values=cache, logits_to_keep=1)
    found = {}
    for index, layer in enumerate(cache.layers):
        for name, store in (("key", layer._keys), ("value", layer._values)):
            for kind in ("shift", "equalizer"):
                statistic = getattr(store, kind)
                if statistic is None:
                    raise InputError(f"layer {index} keeps no packed {name}s to measure")
                found[f"layers.{index}.{name}_{kind}"] = statistic[0].float().contiguous().cpu()
    save_file(found, path, metadata={"format": FORMAT})


def load_layer(path: str, layer: int, heads: slice, device: torch.device) -> Statistics:
    """Return the statistics of a layer's heads, (heads, 1, dim) float32 each.

    Raises:
        FormatError: for another kind of file, or one of another model.
    """
    with safe_open(path, "pt", device=str(device)) as file:
        if (file.metadata() or {}).get("format") != FORMAT:
            raise FormatError(f"{path} holds no statistics; write it with measure_statistics")
        names = ("key_shift", "key_equalizer", "value_shift", "value_equalizer")
        keys = [f"layers.{layer}.{name}" for name in names]
        if missing := [key for key in keys if key not in file.keys()]:  # noqa: SIM118
            raise FormatError(f"{path} lacks {missing[0]}; it was measured on another model")
        found = [file.get_tensor(key) for key in keys]
    if found[0].shape[0] < heads.stop:
        raise FormatError(f"{path} has {found[0].shape[0]} key heads; the model has more")
    return Statistics(*(t[heads] for t in found))
