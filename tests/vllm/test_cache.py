"""The block layout and attention over it, without vLLM: what vLLM stores is what quantize gives."""

from __future__ import annotations

import math

import pytest
import torch

from quantforge.errors import ConfigError, InputError
from quantforge.ops.dequantize.api import dequantize
from quantforge.ops.quantize.api import quantize
from quantforge.vllm.attend import Batch, attend
from quantforge.vllm.pages import BlockFormat, Statistics
from quantforge.vllm.settings import Settings
from tests.helpers import assert_close

TOKENS, HEADS = 16, 2


def cache_of(settings: Settings, dim: int, blocks: int, device: str) -> torch.Tensor:
    width = settings.token_bytes(dim, dim, settings.bits)
    return torch.full((blocks, HEADS, TOKENS, width), 255, dtype=torch.uint8, device=device)


def statistics_of(dim: int, device: str) -> Statistics:
    g = torch.Generator().manual_seed(1)
    shift, equalizer = torch.randn(2, HEADS, 1, dim, generator=g)
    factor = (0.3 * equalizer).exp()
    return Statistics(*(t.to(device) for t in (shift, factor, -shift, 1 / factor)))


@pytest.mark.parametrize("bits", [(4, 4), (3, 2), (8, 1)])
@pytest.mark.parametrize("with_statistics", [False, True])
def test_tokens_come_back_as_quantize_makes_them(device, bits, with_statistics):
    dim, settings = 64, Settings(bits=bits, seed=3)
    block_format = BlockFormat(*settings.specs(dim, dim, bits))
    statistics = statistics_of(dim, device) if with_statistics else Statistics()
    cache = cache_of(settings, dim, 5, device)
    key, value = torch.randn(2, 23, HEADS, dim, device=device)
    # blocks 4 and 1, as a sequence may have them
    slots = torch.cat([4 * TOKENS + torch.arange(16), TOKENS + torch.arange(7)]).to(device)
    for part in (slice(0, 10), slice(10, 11), slice(11, 23)):
        block_format.store(cache, key[part], value[part], slots[part], statistics)
    blocks = torch.tensor([[4, 1]], dtype=torch.int32, device=device)
    keys, values = block_format.read(cache, blocks, statistics)
    parts = zip((keys, values), (key, value), (statistics[:2], statistics[2:]), strict=True)
    for got, x, (shift, equalizer) in parts:
        packed, scales = quantize(x.transpose(0, 1), got.spec, shift=shift, equalizer=equalizer)
        assert torch.equal(got.packed[0, :, :23], packed)
        assert torch.equal(got.scales[0, :, :23], scales)
    untouched = [0, 2, 3]
    assert bool((cache[untouched] == 255).all())


def test_a_padded_token_writes_into_the_block_of_nobody():
    settings = Settings()
    block_format = BlockFormat(*settings.specs(64, 64, settings.bits))
    cache = cache_of(settings, 64, 3, "cpu")
    x = torch.randn(2, HEADS, 64)
    block_format.store(cache, x, x, torch.tensor([-1, 2 * TOKENS]), Statistics())
    assert bool((cache[1] == 255).all())
    assert not bool((cache[2] == 255).all())


def test_a_cache_of_another_width_is_refused():
    block_format = BlockFormat(*Settings().specs(64, 64, (4, 4)))
    cache = torch.zeros(2, HEADS, TOKENS, 64, dtype=torch.uint8)
    with pytest.raises(InputError, match="uint8 of shape"):
        block_format.read(cache, torch.zeros(1, 1, dtype=torch.int32), Statistics())


def decoded(block_format, statistics, key, value):
    """Return what the codes of (tokens, Hkv, dim) stand for."""
    found = []
    specs = (block_format.key_spec, block_format.value_spec)
    for x, spec, pair in zip((key, value), specs, (statistics[:2], statistics[2:]), strict=True):
        names = dict(zip(("shift", "equalizer"), pair, strict=True))
        packed, scales = quantize(x.transpose(0, 1), spec, **names)
        found.append(dequantize(packed, scales, spec, **names).transpose(0, 1))
    return found


def plain_attention(query, key, value, scale):
    """Return causal attention of the last tokens (n, Hq, dim) to all (tokens, Hkv, dim)."""
    n, heads = query.shape[:2]
    k, v = (t.repeat_interleave(heads // t.shape[1], 1).transpose(0, 1) for t in (key, value))
    logits = scale * query.transpose(0, 1) @ k.mT
    seen = torch.ones(n, k.shape[1], dtype=torch.bool, device=k.device).tril(k.shape[1] - n)
    return (logits.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("with_statistics", [False, True])
@pytest.mark.parametrize("key_heads", [2, 1])
def test_attention_is_exact_on_codes_and_new_tokens(device, with_statistics, key_heads):
    """Sequences of other lengths, some with new prompts, some with one new token."""
    dim, settings = 64, Settings(bits=(4, 3))
    block_format = BlockFormat(*settings.specs(dim, dim, settings.bits))
    statistics = statistics_of(dim, device) if with_statistics else Statistics()
    statistics = Statistics(*(s if s is None else s[:key_heads] for s in statistics))
    cache = cache_of(settings, dim, 12, device)[:, :key_heads].contiguous()
    stored, new = [0, 20, 33, 5], [7, 1, 4, 1]
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)) + 1
    tables = [order[i * 3 : i * 3 + 3] for i in range(3)] + [order[9:11]]
    blocks = torch.zeros(4, 3, dtype=torch.int32)
    parts, expected = [], {torch.float32: [], torch.float64: []}
    scale = dim**-0.5
    for i, (old, n) in enumerate(zip(stored, new, strict=True)):
        blocks[i, : len(tables[i])] = tables[i]
        q = torch.randn(n, 4, dim, device=device)
        key, value = torch.randn(2, old + n, key_heads, dim, device=device)
        place = torch.arange(old + n)
        slots = (tables[i][place // TOKENS] * TOKENS + place % TOKENS).to(device)
        block_format.store(cache, key, value, slots, statistics)
        parts.append((q, key[old:], value[old:]))
        if old:
            k_old, v_old = decoded(block_format, statistics, key[:old], value[:old])
            key, value = torch.cat([k_old, key[old:]]), torch.cat([v_old, value[old:]])
        for dtype, found in expected.items():
            found.append(plain_attention(q.to(dtype), key.to(dtype), value.to(dtype), scale))
    query, key, value = (torch.cat(part) for part in zip(*parts, strict=True))
    starts = [0, *torch.tensor(new).cumsum(0).tolist()]
    lengths = [a + b for a, b in zip(stored, new, strict=True)]
    out = torch.full_like(query, math.nan)
    batch = Batch(starts, lengths, blocks.to(device))
    attend(query, key, value, cache, batch, block_format, statistics, scale, out)
    naive, exact = (torch.cat(found).cpu() for found in expected.values())
    assert_close(out, [naive], exact.numpy())


def test_settings_are_json_and_name_what_is_wrong():
    settings = Settings(bits=4, layers={"0": 8, 3: [8, 2]}, codebook="gaussian")
    assert settings.of_layer(0) == (8, 8)
    assert settings.of_layer(3) == (8, 2)
    assert settings.of_layer(1) == (4, 4)
    assert Settings.from_dict(settings.to_dict()) == settings
    assert settings.token_bytes(128, 128, (4, 4)) == 132
    for values, message in (
        ({"bit": 4}, "bit"),
        ({"bits": 9}, "bits of keys"),
        ({"bits": [4, 4, 4]}, "pair"),
        ({"layers": {"first": 4}}, "layers"),
        ({"codebook": "e4m3", "bits": 8}, "e4m3"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ConfigError, match=message):
            Settings.from_dict(values)
