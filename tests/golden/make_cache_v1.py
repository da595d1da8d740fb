"""Made cache_v1*.safetensors once; kept to show how. Do not run it again: old files must load.

PYTHONPATH=src python tests/golden/make_cache_v1.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantforge import QuantForgeCache
from quantforge.llm.latent import LatentLayer
from quantforge.llm.sliding import QuantForgeSlidingLayer

HERE = Path(__file__).parent
SETTINGS = {"sinks": 2, "window": 8, "page_size": 4, "layout": "rows"}
LAYERS = {
    1: {"bits": (3, 2), "shift": False, "codebook": "e4m3", "seed": 7},
    2: {"bits": 2, "importance": (4, 8), "budget": 3.6},
    3: {"bits": 3, "head_bits": {1: (8, 2)}},
    4: {"key_scale_rule": "mse", "equalizer": False},
}


def states(index: int, n: int, heads: int, dims: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    rng = np.random.RandomState(index)
    return tuple(torch.from_numpy(rng.standard_normal((1, heads, n, d))).float() for d in dims)


def fill(cache: QuantForgeCache, index: int, dims: tuple[int, int] = (16, 16)) -> None:
    """Append a prompt and some tokens, each attended to by a query."""
    heads = 1 if dims != (16, 16) else 2
    key, value = states(index, 40, heads, dims)
    query = states(100 + index, 40, heads, dims)[0]
    for span in (slice(0, 29), *(slice(i, i + 1) for i in range(29, 40))):
        k, v = cache.update(key[:, :, span], value[:, :, span], index)
        if dims[0] == dims[1]:
            F.scaled_dot_product_attention(query[:, :, span], k, v)


def numbers(cache: QuantForgeCache) -> dict[str, np.ndarray]:
    out = {}
    for i, layer in enumerate(cache.layers):
        for name in ("keys", "values"):
            t = getattr(layer, name)
            t = t if type(t) is torch.Tensor else t.dequantize()
            out[f"{i}.{name}"] = t[:, :, : layer.get_seq_length()].numpy()
    return out


def main() -> None:
    cache = QuantForgeCache(layers=LAYERS, **SETTINGS)
    for index in range(5):
        fill(cache, index)
    cache.layers += [
        QuantForgeSlidingLayer(cache.options, 20),
        LatentLayer(cache.options, 32),
        DynamicLayer(),
        DynamicSlidingWindowLayer(20),
    ]
    for index, dims in ((5, (16, 16)), (6, (32, 8)), (7, (16, 16)), (8, (16, 16))):
        fill(cache, index, dims)
    cache.layers[2].crop(-14)  # leaves dead slots
    cache.save(HERE / "cache_v1.safetensors", metadata={"made by": "make_cache_v1.py"})
    static = QuantForgeCache(max_cache_len=64, **SETTINGS)
    fill(static, 0)
    static.save(HERE / "cache_v1_static.safetensors")
    static = QuantForgeCache.load(HERE / "cache_v1_static.safetensors", max_cache_len=None)
    held = {f"static.{name}": t for name, t in numbers(static).items()}
    np.savez_compressed(HERE / "cache_v1.npz", **numbers(cache), **held)


if __name__ == "__main__":
    main()
