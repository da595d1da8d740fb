"""Heads with outliers beyond the equalizer get more bits, found when the first page is packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quantforge.errors import ConfigError
from quantforge.llm import QuantForgeCache
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig
from tests.llm.conformance import dense
from tests.llm.models import SETTINGS

DIM, LENGTH = 64, 120


def states(loud: dict[int, float], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and queries of 3 heads, of which some keys have two channels as loud."""
    generator = torch.Generator().manual_seed(seed)
    keys, query = (torch.randn(2, 3, LENGTH, DIM, generator=generator) for _ in range(2))
    for head, gain in loud.items():
        keys[:, head, :, 5:7] *= gain
    return keys, query


def filled(loud: dict[int, float], quiet: bool = False, **settings: Any) -> QuantForgeCache:
    """Return a cache that has attended; `quiet` queries make up for loud keys."""
    keys, query = states(loud)
    if quiet:
        for head, gain in loud.items():
            query[:, head, :, 5:7] /= gain
    cache = QuantForgeCache(**(SETTINGS | settings))
    k, v = cache.update(keys, torch.randn_like(keys), 0)
    F.scaled_dot_product_attention(query, k, v, is_causal=True)
    return cache


def raised(cache: QuantForgeCache) -> dict[int, Any]:
    return dict(cache.layers[0].options.head_bits)


def test_heads_beyond_the_equalizer_are_raised_and_reported() -> None:
    cache = filled({1: 400.0}, outlier_bits=8)
    assert raised(cache) == {1: 8}
    row = cache.report().layers[0]
    assert row.bits == "4, 4 heads 0,2 | 8, 8 heads 1"
    assert row.done[-1] == "outliers left in heads 1: raised to 8 bits"
    plain = filled({1: 400.0})
    keys = states({1: 400.0})[0]
    for head, least, most in ((0, 0.9, 1.1), (1, 0.0, 0.15), (2, 0.9, 1.1)):
        error, before = (
            float((dense(c.layers[0].keys)[:, head] - keys[:, head]).norm()) for c in (cache, plain)
        )
        assert least <= error / before <= most


def test_what_the_equalizer_takes_out_is_left() -> None:
    assert raised(filled({0: 30.0}, quiet=True, outlier_bits=8)) == {}
    assert raised(filled({}, outlier_bits=8)) == {}
    # without it, the same channels take the bits of the others
    assert raised(filled({0: 30.0}, quiet=True, outlier_bits=8, equalizer=False)) == {0: 8}


def test_it_is_decided_once_and_anew_after_a_reset() -> None:
    cache = filled({2: 400.0}, outlier_bits=(8, 4))
    assert raised(cache) == {2: (8, 4)}
    cache.crop(-100)
    cache.update(*states({0: 400.0}), 0)
    assert cache.get_seq_length() == 140
    assert raised(cache) == {2: (8, 4)}
    cache.reset()
    k, v = cache.update(*states({0: 400.0}), 0)
    F.scaled_dot_product_attention(states({})[1], k, v, is_causal=True)
    assert raised(cache) == {0: (8, 4)}


def test_files_know_what_was_decided(tmp_path: Path) -> None:
    cache = filled({1: 400.0}, outlier_bits=8)
    cache.save(tmp_path / "a.safetensors")
    loaded = QuantForgeCache.load(tmp_path / "a.safetensors")
    assert raised(loaded) == {1: 8}
    assert loaded.options.outlier_bits == 8
    assert torch.equal(dense(loaded.layers[0].keys), dense(cache.layers[0].keys))
    fork = cache.fork()
    for c in (cache, loaded, fork):
        c.update(*states({}, seed=1), 0)
    want = dense(cache.layers[0].keys)
    assert all(torch.equal(dense(c.layers[0].keys), want) for c in (loaded, fork))


def test_settings() -> None:
    for settings in ({"head_bits": {0: 8}}, {"bits": 2, "importance": (8,), "budget": 3.0}):
        with pytest.raises(ConfigError, match="excludes importance and head_bits"):
            CacheConfig(outlier_bits=8, **settings)
    with pytest.raises(ConfigError, match="not be below bits=4"):
        CacheConfig(outlier_bits=3)
    with pytest.raises(ConfigError, match="max_cache_len"):
        QuantForgeCache(max_cache_len=64, outlier_bits=8)
    assert QuantForgeLayer(CacheConfig()).options.outlier_bits is None
