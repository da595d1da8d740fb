"""Reports say what was held, measured and done; presets are settings by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quantforge import QuantForgeCache
from quantforge.errors import ConfigError
from quantforge.llm.presets import PRESETS
from tests.llm.models import SETTINGS, random_model
from tests.llm.test_cache import tokens


def filled(transform: Any = lambda x: x, dim: int = 64, **settings: Any) -> QuantForgeCache:
    """Return a cache of one layer whose queries have attended."""
    generator = torch.Generator().manual_seed(0)
    states = transform(torch.randn(1, 2, 200, dim, generator=generator))
    query = torch.randn(1, 4, 200, dim, generator=generator)
    cache = QuantForgeCache(**{**SETTINGS, **settings})
    key, value = cache.update(states, torch.randn(1, 2, 200, dim, generator=generator), 0)
    F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return cache


def loud(x: torch.Tensor) -> torch.Tensor:
    x[..., 5] *= 50
    return x


def test_report_of_ordinary_data() -> None:
    cache = filled()
    report = cache.report()
    (layer,) = report.layers
    assert layer.done == ("nothing unusual",)
    assert (layer.tokens, layer.packed, layer.sinks, layer.recent) == (200, 176, 4, 20)
    assert layer.nbytes == report.nbytes == cache.nbytes
    assert layer.bits_per_number == pytest.approx(8 * cache.nbytes / (2 * 2 * 200 * 64))
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["bits"] == "4, 4"
    text = str(report)
    assert "logit error" in text
    assert "nothing unusual" in text


@pytest.mark.parametrize("bits", [4, 2])
def test_logit_error_is_the_one_that_codes_make(bits: int) -> None:
    """The prediction is the spread of logits over codes minus logits over the keys themselves."""
    cache = filled(loud, bits=bits, sinks=0, window=0, page_size=1)
    generator = torch.Generator().manual_seed(0)
    keys = loud(torch.randn(1, 2, 200, 64, generator=generator))
    query = torch.randn(1, 4, 200, 64, generator=generator)
    error = cache.layers[0].keys.dequantize() - keys
    logits = query @ error.repeat_interleave(2, 1).mT / 8
    of_heads = logits.unflatten(1, (2, 2)).std((0, 2, 3, 4))
    assert cache.report().layers[0].logit_error == pytest.approx(float(of_heads.max()), rel=0.25)


def test_outliers_and_bias_are_found_and_what_was_done_is_said() -> None:
    done = filled(loud).report().layers[0].done
    assert done == ("key outliers: equalized by keys and queries",)
    done = filled(loud, equalizer=False).report().layers[0].done
    assert done == ("key outliers: LEFT ALONE (equalizer=False)",)
    biased = filled(lambda x: x + 5).report().layers[0]
    assert biased.done == ("key bias: mean taken out",)
    assert biased.key_bias == pytest.approx(5, rel=0.1)
    assert filled(lambda x: x + 5, shift=False).report().layers[0].done == (
        "key bias: mean LEFT IN (shift=False)",
    )


def test_bits_of_tiers_and_heads_are_said() -> None:
    (layer,) = filled(bits=2, importance=(4,), budget=3.0).report().layers
    assert layer.bits == "2, 2 65.9% | 4, 4 34.1%"
    (layer,) = filled(bits=2, head_bits={1: (8, 4)}).report().layers
    assert layer.bits == "2, 2 heads 0 | 8, 4 heads 1"
    assert layer.logit_error is not None


def test_layers_without_packed_tokens_are_named() -> None:
    model = random_model("gemma3_text")
    cache = QuantForgeCache(model.config, **SETTINGS)
    assert [layer.done for layer in cache.report().layers] == [("nothing yet",)] * 2
    with torch.no_grad():
        model(tokens(1, 90), past_key_values=cache)
    kinds = {layer.kind for layer in cache.report().layers}
    assert len(kinds) == 2
    assert "MiB in 2 layers" in str(cache.report())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings_by_name(name: str) -> None:
    by_name, by_keyword = QuantForgeCache(name), QuantForgeCache(preset=name, window=64)
    for setting, value in PRESETS[name].items():
        assert getattr(by_name.options, setting) == value
    assert by_keyword.options.window == 64
    assert by_keyword.options.bits == by_name.options.bits


def test_static_caches_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(ConfigError, match="leave out max_cache_len"):
        QuantForgeCache("small", max_cache_len=100)


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ConfigError, match="quality, balanced, small"):
        QuantForgeCache("medium")
