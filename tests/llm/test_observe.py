"""Queries are seen through the attention functions of models, and packing waits for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quantforge import QuantForgeCache
from quantforge.llm.attention import quantforge_attention
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.observe import Queries, WatchedTensor
from quantforge.llm.options import CacheConfig
from quantforge.llm.segments import SegmentedTensor
from tests.llm.models import SETTINGS, random_model
from tests.llm.test_cache import tokens

MODELS = [  # transformers has no sdpa for Gemma-2, whose logits are soft-capped
    *((family, "sdpa") for family in ("llama", "qwen2", "qwen3", "phi3", "gpt_neox", "falcon")),
    *((family, "eager") for family in ("llama", "gemma2", "gemma3_text", "gpt_neox", "falcon")),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rms_and_latest_by_hand() -> None:
    queries = Queries(recent=3)
    first, second = random(2, 4, 10, 8), random(2, 4, 1, 8, seed=1)
    queries.see(first, 2, 10, None)
    queries.see(second.reshape(2, 2, 2, 8), 2, 1, None)  # heads folded into rows
    both = torch.cat([first, second], 2).unflatten(1, (2, 2))
    rms = both.square().mean((2, 3)).sqrt().unsqueeze(2)
    torch.testing.assert_close(queries.rms, rms)
    assert torch.equal(queries.latest(), both[:, :, :, -3:])
    queries.see(random(2, 4, 7), 2, 1, None)
    queries.see(random(2, 3, 1, 8), 2, 1, None)
    torch.testing.assert_close(queries.rms, rms)


@pytest.mark.parametrize("m", [1, 5])
def test_mass_is_that_of_causal_attention(m: int) -> None:
    query, key = random(2, 4, 12, 8), random(2, 2, 12, 8, seed=1)
    queries = Queries(recent=m)
    queries.see(query, 2, 12, 0.5)
    logits = query @ key.repeat_interleave(2, 1).mT * 0.5
    logits = logits.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    weights = logits.softmax(-1)[:, :, -m:].unflatten(1, (2, 2)).mean((2, 3))
    torch.testing.assert_close(queries.mass(key), weights)
    torch.testing.assert_close(queries.mass(key).sum(-1), torch.ones(2, 2))


@pytest.mark.parametrize(("family", "attention"), MODELS)
def test_queries_of_models_are_seen(family: str, attention: str) -> None:
    """Models of all kinds: the statistics are there before anybody asks for them."""
    model, seen = random_model(family, attention), []

    class Layer(QuantForgeLayer):
        def _see(self, query: torch.Tensor, scale: float | None, mask: Any = None) -> None:
            super()._see(query, scale, mask)
            seen.append((query.shape, scale, self._keys.n_packed))

    class Cache(QuantForgeCache):
        def _new_layer(self, index: int) -> QuantForgeLayer:
            return Layer(self.options)

    cache = Cache(**SETTINGS)
    with torch.no_grad():
        logits = model(tokens(2, 60), past_key_values=cache).logits
        exact = model(tokens(2, 60)).logits
    assert torch.equal(logits, exact), "a watched prompt attends as any other"
    assert len(seen) == len(cache.layers) == 2
    for layer, (shape, _, packed) in zip(cache.layers, seen, strict=True):
        assert (torch.as_tensor(layer._queries.rows) == shape[1] // layer._keys.heads * 60).all()
        assert packed > 0, "packed as soon as attention has run"
        assert layer._keys.query_rms.shape == layer._keys.equalizer.shape


def test_equalizer_is_that_of_keys_and_queries() -> None:
    layer = QuantForgeLayer(CacheConfig(**SETTINGS))
    x = random(1, 2, 80, 32) * torch.logspace(-1, 1, 32)
    query = random(1, 4, 80, 32, seed=1) * torch.logspace(1, -1, 32)
    key, value = layer.update(x, x)
    assert isinstance(key, WatchedTensor)
    F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    rest = x[:, :, 4:]
    ratio = (rest - rest.mean(2, keepdim=True)).square().mean(2, keepdim=True).sqrt()
    ratio = ratio / query.unflatten(1, (2, 2)).square().mean((2, 3)).sqrt().unsqueeze(2)
    expected = (ratio / ratio.amax(-1, keepdim=True)).sqrt()
    torch.testing.assert_close(layer._keys.equalizer, expected)
    later = random(1, 2, 1, 32, seed=2)
    for _ in range(20):
        key, value = layer.update(later, later)
        assert isinstance(key, SegmentedTensor)
        F.scaled_dot_product_attention(query[:, :, :1] * 9, key, value, enable_gqa=True)
    torch.testing.assert_close(layer._keys.equalizer, expected)  # frozen


def test_without_attention_the_next_update_packs() -> None:
    layer = QuantForgeLayer(CacheConfig(**SETTINGS))
    x = random(1, 2, 80, 32)
    layer.update(x, x)
    assert layer._keys.n_packed == 0
    keys, _ = layer.update(x[:, :, :1], x[:, :, :1])
    assert isinstance(keys, SegmentedTensor)
    assert layer._keys.query_rms is None
    other = QuantForgeLayer(CacheConfig(**SETTINGS))
    other.update(x, x)
    assert isinstance(other.keys, SegmentedTensor), "a look at the keys does too"
    assert torch.equal(other.keys.packed.packed, keys.packed.packed[:, :, : other._keys.n_rows])


def test_bytes_count_what_was_packed() -> None:
    layers = [QuantForgeLayer(CacheConfig(equalizer=on, **SETTINGS)) for on in (True, False)]
    for layer in layers:
        layer.update(random(1, 2, 400, 32), random(1, 2, 400, 32))
    waited, at_once = (layer.nbytes for layer in layers)
    statistics = 2 * 2 * 32 * 4  # equalizers of keys and values, 2 heads
    assert waited == at_once + statistics


@pytest.mark.parametrize("inference", [torch.inference_mode, torch.no_grad])
def test_grad_modes_may_change_between_calls(inference: Any) -> None:
    model, cache = random_model("llama"), QuantForgeCache(**SETTINGS)
    with inference():
        model(tokens(1, 60), past_key_values=cache)
    with torch.no_grad():
        model(tokens(1, 30), past_key_values=cache)
    assert cache.get_seq_length() == 90


# ---- left padding --------------------------------------------------------------------------------

PADDING = 37


def padded(attend: str, chunks: tuple[int, ...] = (120,), **settings: Any) -> QuantForgeLayer:
    """Return a layer whose first row is the second without its first tokens, padded on the left.

    Padding is loud, and attended to by what no query of a token may see.
    """
    layer = QuantForgeLayer(CacheConfig(**{**SETTINGS, "sinks": 0, **settings}))
    n = sum(chunks)
    x, query = (
        random(1, 2, n, 32).repeat(2, 1, 1, 1),
        random(1, 4, n, 32, seed=1).repeat(2, 1, 1, 1),
    )
    query[..., :4] *= 3
    x[0, :, :PADDING], query[0, :, :PADDING] = 100.0, 50.0
    real = torch.ones(2, n, dtype=torch.bool)
    real[0, :PADDING] = False
    mask = torch.ones(n, n).tril().bool() & real[:, None, None]
    start = 0
    for stop in torch.tensor(chunks).cumsum(0).tolist():
        part, seen = slice(start, stop), mask[:, :, start:stop, :stop]
        keys = layer.update(x[:, :, part], x[:, :, part])
        if attend in ("added", "eager"):
            seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        if attend == "quantforge":
            module = torch.nn.Module()
            quantforge_attention(module, query[:, :, part], *keys, seen, softcap=30.0)
        elif attend == "eager":
            logits = query[:, :, part] @ keys[0].repeat_interleave(2, 1).transpose(2, 3) / 32**0.5
            bias = torch.linspace(-1, 0, stop)
            weights = (torch.tanh(logits) + bias + seen).softmax(-1)
            assert type(weights) is torch.Tensor, "nothing is watched behind the softmax"
        else:
            F.scaled_dot_product_attention(query[:, :, part], *keys, seen, enable_gqa=True)
        start = stop
    return layer


@pytest.mark.parametrize("attend", ["sdpa", "added", "quantforge", "eager"])
@pytest.mark.parametrize("chunks", [(120,), (20, 100), (20, 10, 90)])
def test_left_padding_is_not_measured(attend: str, chunks: tuple[int, ...]) -> None:
    # one page that comes due with the last chunk
    layer = padded(attend, chunks, window=20 + max(chunks[:-1], default=0), page_size=60)
    x, query = random(1, 2, 120, 32), random(1, 4, 120, 32, seed=1)
    query[..., :4] *= 3
    assert layer._queries.padding.tolist() == [PADDING, 0]
    for row, first in ((0, PADDING), (1, 0)):
        rest, asked = x[0, :, first:], query[0, :, first:]
        mean, rms = rest.mean(1), rest.std(1, correction=0)
        for store in (layer._keys, layer._values):
            torch.testing.assert_close(store.shift[row, :, 0], mean)
            torch.testing.assert_close(store.moments[1][row, :, 0], rms)
        of_queries = asked.unflatten(0, (2, 2)).square().mean((1, 2)).sqrt()
        torch.testing.assert_close(layer._keys.query_rms[row, :, 0], of_queries)


def test_left_padding_is_not_important() -> None:
    layer = padded("sdpa", bits=2, importance=(8,), budget=3.5, window=16)
    tiers = layer.keys.places.tiers
    assert (tiers[0, :, :PADDING] == 0).all()
    assert (tiers[0] == 1).sum() == (tiers[1] == 1).sum() > 0
    # and takes no attention from the others
    query, x = random(2, 2, 5, 8), random(2, 2, 12, 8, seed=1)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :9] = False
    queries = Queries(recent=5)
    queries.see(query, 2, 5, None)
    mass = queries.mass(x, real)
    assert (mass[0, :, :9] == -1).all()
    torch.testing.assert_close(mass[0, :, 9:].sum(-1), torch.ones(2))
    torch.testing.assert_close(mass[1], queries.mass(x)[1])
    short = Queries(recent=3)  # queries of padding count for nothing
    short.see(query[:1, :, 2:], 2, 3, None)
    torch.testing.assert_close(mass[:1, :, 9:], short.mass(x[:1, :, 9:]))


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("gpt_oss", "eager")],
)
def test_masks_of_models_tell_their_padding(family: str, attention: str) -> None:
    model = random_model(family, attention)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :17] = 0
    cache = QuantForgeCache(**SETTINGS)
    with torch.no_grad():
        model(tokens(2, 60), attention_mask=mask, past_key_values=cache)
    for layer in cache.layers:
        assert layer._queries.padding.tolist() == [17, 0]
    cache.batch_repeat_interleave(2)
    assert cache.layers[0]._queries.padding.tolist() == [17, 17, 0, 0]
    assert cache.layers[0]._queries.rms.shape[0] == 4


def test_sliding_layers_tell_their_padding() -> None:
    model = random_model("gemma3_text", "sdpa")
    cache = QuantForgeCache(model.config, **{**SETTINGS, "window": 8, "page_size": 8})
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :17] = 0
    with torch.no_grad():
        model(tokens(2, 90), attention_mask=mask, past_key_values=cache)
    assert [layer._queries.padding.tolist() for layer in cache.layers] == [[17, 0]] * 2
