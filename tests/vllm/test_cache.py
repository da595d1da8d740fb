"""The block layout and attention over it, without vLLM: what vLLM stores is what quantize gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from quantforge.errors import ConfigError, InputError
from quantforge.ops.dequantize.api import dequantize
from quantforge.ops.quantize.api import quantize
from quantforge.vllm.attend import Batch, attend, attend_single
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


@dataclass
class Step:
    """A step over sequences in shuffled blocks, and what plain torch makes of it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    batch: Batch
    block_format: BlockFormat
    statistics: Statistics
    scale: float
    naive: list[torch.Tensor]
    exact: torch.Tensor

    def run(self, attention=attend) -> torch.Tensor:
        """Return what attention writes into an output of NaN."""
        out = torch.full_like(self.query, math.nan)
        attention(
            *(self.query, self.key, self.value, self.cache, self.batch, self.block_format),
            *(self.statistics, self.scale, out),
        )
        return out

    def check(self, out: torch.Tensor, tokens: list[int] | slice = slice(None)) -> None:
        """Compare tokens of an output."""
        assert_close(out[tokens], [n[tokens] for n in self.naive], self.exact[tokens].numpy())


def step_of(
    stored: list[int],
    new: list[int],
    device: torch.device | str,
    *,
    key_heads: int = 2,
    with_statistics: bool = True,
    dtype: torch.dtype = torch.float32,
    dim: int = 64,
    bits: tuple[int, int] = (4, 3),
) -> Step:
    """Return a step; what no token was stored in holds 255: scales of it are NaN.

    `naive` is once in float32, once with rounded keys and values, as in a long chunk of a prompt.
    """
    settings, scale = Settings(bits=bits), dim**-0.5
    block_format = BlockFormat(*settings.specs(dim, dim, settings.bits))
    statistics = statistics_of(dim, device) if with_statistics else Statistics()
    statistics = Statistics(*(s if s is None else s[:key_heads] for s in statistics))
    counts = [-(-(old + n) // TOKENS) for old, n in zip(stored, new, strict=True)]
    cache = cache_of(settings, dim, sum(counts) + 1, device)[:, :key_heads].contiguous()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(sum(counts), generator=generator) + 1
    blocks = torch.zeros(len(new), max(counts), dtype=torch.int32)
    parts, expected = [], ([], [], [])
    for i, (old, n, table) in enumerate(zip(stored, new, order.split(counts), strict=True)):
        blocks[i, : counts[i]] = table
        q = torch.randn(n, 4, dim, generator=generator).to(device, dtype)
        key, value = torch.randn(2, old + n, key_heads, dim, generator=generator).to(device, dtype)
        place = torch.arange(old + n)
        slots = (table[place // TOKENS] * TOKENS + place % TOKENS).to(device)
        block_format.store(cache, key, value, slots, statistics)
        parts.append((q, key[old:], value[old:]))
        if old:
            coded = decoded(block_format, statistics, key[:old].float(), value[:old].float())
            key, value = (
                torch.cat([c, x[old:].float()]) for c, x in zip(coded, (key, value), strict=True)
            )
        plain = [x.float() for x in (q, key, value)]
        rounded = [x.to(dtype).float() for x in plain]
        double = [x.double() for x in plain]
        for found, xs in zip(expected, (plain, rounded, double), strict=True):
            found.append(plain_attention(*xs, scale).cpu())
    starts = [0, *torch.tensor(new).cumsum(0).tolist()]
    lengths = torch.tensor(stored, dtype=torch.int32, device=device)
    batch = Batch(starts, lengths, max(stored), stored, blocks.to(device))
    operands = (torch.cat(part) for part in zip(*parts, strict=True))
    *naive, exact = (torch.cat(found) for found in expected)
    return Step(*operands, cache, batch, block_format, statistics, scale, naive, exact)


MIXED = [0, 20, 33, 5, 0, 41], [7, 1, 4, 1, 1, 2]


@pytest.mark.parametrize("with_statistics", [False, True])
@pytest.mark.parametrize("key_heads", [2, 1])
def test_attention_is_exact_on_codes_and_new_tokens(device, with_statistics, key_heads):
    """Sequences of other lengths, some with new prompts, some with one new token."""
    step = step_of(*MIXED, device, key_heads=key_heads, with_statistics=with_statistics)
    step.check(step.run())


@pytest.mark.parametrize("new", [[1, 1, 1, 1], [3, 1, 1, 2]], ids=["all", "some"])
def test_sequences_with_one_new_token_are_attended_to_together(device, new):
    step = step_of([20, 0, 90, 3], new, device)
    out = step.run(attend_single)
    single = [step.batch.starts[i] for i, n in enumerate(new) if n == 1]
    step.check(out, single)
    others = [i for i in range(len(out)) if i not in single]
    assert bool(out[others].isnan().all())


def test_padded_sequences_of_a_graph_do_no_harm(device):
    """Their length is 0 and their table names any block."""
    step = step_of([20, 33, 7, 50, 16], [1] * 5, device)
    expected = step.run(attend_single)
    step.batch = Batch(
        list(range(7)),
        torch.nn.functional.pad(step.batch.stored, (0, 1)),
        1000,
        [],
        torch.nn.functional.pad(step.batch.blocks, (0, 2, 0, 1), value=1),
    )
    for name in ("query", "key", "value"):
        tensor = getattr(step, name)
        setattr(step, name, torch.cat([tensor, tensor[:1]]))
    out = step.run(attend_single)
    torch.testing.assert_close(out[:5], expected)
    assert torch.equal(out[5], step.value[5].repeat_interleave(2, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "bits"), [(128, (4, 4)), (64, (3, 2)), (128, (8, 4))])
def test_half_numbers_on_a_gpu(dtype, dim, bits):
    """Long and short histories, chunks of prompts, and prompts, in vLLM's layout."""
    stored, new = [3000, 17, 0, 260, 700], [1, 1, 130, 65, 1]
    step = step_of(stored, new, "cuda", dtype=dtype, dim=dim, bits=bits)
    step.check(step.run())


@pytest.mark.gpu
def test_a_step_of_single_tokens_is_captured_without_waiting():
    step = step_of([20, 33, 300], [1, 1, 1], "cuda", dtype=torch.float16)
    assert step.batch.single is not None
    step.run()
    out = torch.empty_like(step.query)
    arguments = (step.query, step.key, step.value, step.cache, step.batch, step.block_format)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(*arguments, step.statistics, step.scale, out)
    for shorter in (10, 5, 0):
        step.batch.stored.copy_(torch.tensor([20, 33, 300]) - shorter)
        graph.replay()
        assert torch.equal(out, step.run())
    step.check(out)


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
