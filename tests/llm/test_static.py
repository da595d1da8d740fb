"""`QuantForgeCache(max_cache_len=...)`: one graph for all steps, and the rest of the protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig

from quantforge.errors import ConfigError, InputError, UnsupportedError
from quantforge.llm import QuantForgeCache
from quantforge.llm.options import CacheConfig
from quantforge.llm.static import QuantForgeStaticLayer
from quantforge.llm.static_view import StaticTensor
from tests.llm.models import SETTINGS, random_model

PAGES: dict[str, Any] = {"sinks": 4, "window": 16, "layout": "pages"}
"""Pages of 64 tokens, which eager torch reads on the CPU."""
LAYOUTS = {"rows": (SETTINGS, {}), "pages": (PAGES, {"head_dim": 64})}


@dataclass(frozen=True)
class Where:
    """A layout, with the settings and the model that have it."""

    settings: dict[str, Any]
    model: Any

    def cache(self, max_cache_len: int | None = 256, **changes: Any) -> QuantForgeCache:
        settings = self.settings | {"max_cache_len": max_cache_len} | changes
        return QuantForgeCache(self.model.config, **settings)


@pytest.fixture(scope="module", params=LAYOUTS)
def where(request: pytest.FixtureRequest) -> Where:
    settings, changes = LAYOUTS[request.param]
    return Where(settings, random_model("llama", **changes))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def prompt(n: int = 40, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(1, 128, (batch, n), generator=generator)


def decode(
    model: Any, cache: Any, steps: int, forward: Callable | None = None, n: int = 40
) -> torch.Tensor:
    """Return the logits of a prompt's last token and of greedy steps."""
    logits = [model(prompt(n), past_key_values=cache).logits[:, -1:]]
    for _ in range(steps):
        token = logits[-1].argmax(-1)
        logits.append((forward or model)(token, past_key_values=cache).logits)
    return torch.cat(logits, 1)


def compiled(model: Any, backend: str = "eager") -> tuple[Callable, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model.__call__, backend=counter, fullgraph=True), counter


# ---- the same numbers ------------------------------------------------------------------------


def test_holds_what_the_dynamic_cache_holds(where: Where) -> None:
    """The same packing schedule, so the same codes; attention rounds differently."""
    page = 64 if where.settings is PAGES else 8
    static, dynamic = where.cache(), where.cache(None, page_size=page)
    got = decode(where.model, static, 100, n=100)
    expected = decode(where.model, dynamic, 100, n=100)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert static.get_seq_length() == dynamic.get_seq_length() == 200
    for ours, theirs in zip(static.layers, dynamic.layers, strict=True):
        stores = list(zip(ours._stores(), theirs._stores(), strict=True))
        for mine, other in stores:
            # a page leaves one step later: right before the token that finds no room
            assert 0 <= other.n_packed - mine.n_packed <= page
            if mine.pages is None:
                n = mine.n_packed
                assert n > page
                near = (mine.packed[:, :, :n] == other.packed[:, :, :n]).float().mean()
                assert near > 0.999  # a code at a boundary may fall to either side


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_the_eager_step(where: Where, backend: str) -> None:
    expected = decode(where.model, where.cache(), 150)
    forward, counter = compiled(where.model, backend)
    cache = where.cache()
    assert torch.equal(decode(where.model, cache, 150, forward), expected)
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    packed = [int(layer._window.counts[0, 0]) for layer in cache.layers]
    assert min(packed) >= 128  # pages have left the window in the graph


@pytest.mark.slow
def test_a_thousand_steps_in_one_graph() -> None:
    model = random_model("llama", max_position_embeddings=2048, num_hidden_layers=1)
    where = Where(SETTINGS, model)
    forward, counter = compiled(model)
    cache = where.cache(1100)
    got = decode(model, cache, 1000, forward)
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    assert torch.equal(got, decode(model, where.cache(1100), 1000))
    assert int(cache.get_seq_length()) == 1040


@pytest.mark.slow
def test_inductor_writes_in_place(where: Where) -> None:
    forward, counter = compiled(where.model, "inductor")
    cache, eager = where.cache(), where.cache()
    expected = decode(where.model, eager, 80)
    got = decode(where.model, cache, 80, forward)
    assert counter.frame_count == 1
    if where.settings is PAGES:  # nothing has been packed so far
        torch.testing.assert_close(got[:, :40], expected[:, :40], rtol=1e-4, atol=1e-4)
    # inductor rounds otherwise, and a code at a boundary may fall to either side
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.01)
    for ours, theirs in zip(cache.layers, eager.layers, strict=True):
        for mine, other in zip(ours._window, theirs._window, strict=True):
            if mine.dtype == torch.uint8:
                assert (mine == other).float().mean() > 0.999


def test_a_short_prompt_is_measured_in_the_graph(where: Where) -> None:
    """The first page leaves the window in a compiled step: shift and equalizer too."""
    forward, counter = compiled(where.model)
    cache = where.cache()
    got = decode(where.model, cache, 90, forward, n=3)
    assert torch.equal(got, decode(where.model, where.cache(), 90, n=3))
    assert counter.frame_count == 1
    statistics = cache.layers[0]._window.k_statistics
    assert bool(statistics[0].any())
    assert float(statistics[1].min()) < 1.0


# ---- masks and generate() ----------------------------------------------------------------------

COMPILE = CompileConfig(fullgraph=True, mode=None, backend="eager")
COMPILE._compile_all_devices = True
GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "do_sample": False},
}


def padded(n: int = 100) -> dict[str, torch.Tensor]:
    """Return a batch whose rows have different lengths, padded on the left."""
    ids, mask = prompt(n), torch.ones(2, n, dtype=torch.int64)
    mask[0, :13] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("mode", GENERATE)
def test_generate_with_left_padding(where: Where, mode: str, compiles: bool) -> None:
    def run(cache: Any, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return where.model.generate(
            **padded(), past_key_values=cache, max_new_tokens=70, **GENERATE[mode], **options
        )

    page = 64 if where.settings is PAGES else 8
    options = {"compile_config": COMPILE} if compiles and mode != "beams" else {}
    got = run(where.cache(), **options)
    assert torch.equal(got, run(where.cache(None, page_size=page)))


def test_generate_compiles_once_for_caches_of_a_size(where: Where) -> None:
    model = where.model
    options = {"do_sample": False, "compile_config": COMPILE, "max_new_tokens": 60}
    cache = where.cache()
    first = model.generate(**padded(), past_key_values=cache, **options)
    assert counters["stats"]["unique_graphs"] == 1
    cache.reset()
    assert torch.equal(model.generate(**padded(), past_key_values=cache, **options), first)
    again = model.generate(**padded(), past_key_values=where.cache(), **options)
    assert torch.equal(again, first)
    assert counters["stats"]["unique_graphs"] == 1
    longer = where.cache(400)
    assert torch.equal(model.generate(**padded(), past_key_values=longer, **options), first)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_second_turn_continues_after_compiled_steps(where: Where) -> None:
    page = 64 if where.settings is PAGES else 8
    static, dynamic = where.cache(), where.cache(None, page_size=page)
    options = {"do_sample": False, "max_new_tokens": 50}
    ids = {"static": prompt(100), "dynamic": prompt(100)}
    for _ in range(2):
        ids["static"] = where.model.generate(
            ids["static"], past_key_values=static, compile_config=COMPILE, **options
        )
        ids["dynamic"] = where.model.generate(ids["dynamic"], past_key_values=dynamic, **options)
        more = prompt(35)
        ids = {name: torch.cat([t, more], 1) for name, t in ids.items()}
    assert torch.equal(ids["static"], ids["dynamic"])


@pytest.mark.parametrize("chunk", [30, 45])
def test_prefill_in_chunks(where: Where, chunk: int) -> None:
    """Eager chunks that do not fit into the window take the way of a prompt."""
    page = 64 if where.settings is PAGES else 8
    static, dynamic = where.cache(), where.cache(None, page_size=page)
    ids = prompt(100)
    for cache in (static, dynamic):
        for part in ids.split(chunk, 1):
            logits = where.model(part, past_key_values=cache).logits
        cache.last = logits
    torch.testing.assert_close(static.last, dynamic.last, rtol=1e-4, atol=1e-4)
    assert int(static.get_seq_length()) == 100


def test_a_mask_with_holes_is_honoured(where: Where) -> None:
    """Any bool mask over positions, and None for all tokens before the query."""
    layer = QuantForgeStaticLayer(where.cache().options, 256)
    dim = 64
    keys, values = torch.randn(2, 2, 2, 120, dim).unbind(0)
    layer.update(keys[:, :, :100], values[:, :, :100])
    for i in range(100, 120):
        k, v = layer.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    query = torch.randn(2, 4, 3, dim)
    mask = torch.rand(2, 1, 3, layer.capacity) > 0.3
    dense = [decoded(layer, i) for i in range(2)]
    got = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True)
    expected = F.scaled_dot_product_attention(
        query, *dense, attn_mask=mask[..., :120], enable_gqa=True
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    causal = torch.arange(120) <= torch.arange(117, 120)[:, None]
    got = F.scaled_dot_product_attention(query, k, v, enable_gqa=True)
    expected = F.scaled_dot_product_attention(query, *dense, attn_mask=causal, enable_gqa=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def decoded(layer: QuantForgeStaticLayer, which: int) -> torch.Tensor:
    """Return all keys (0) or values (1) of a layer, decoded."""
    view = layer._stores()[which].view()
    assert view is not None
    return view if type(view) is torch.Tensor else view.dequantize()


# ---- the protocol ------------------------------------------------------------------------------


def filled(where: Where, n: int = 120, **changes: Any) -> QuantForgeStaticLayer:
    layer = QuantForgeStaticLayer(where.cache(**changes).options, 256)
    keys, values = torch.randn((2, 2, 2, n, 64), generator=torch.Generator().manual_seed(n))
    layer.update(keys[:, :, :100], values[:, :, :100])
    for i in range(100, n):
        layer.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    return layer


def addresses(layer: QuantForgeStaticLayer) -> list[int]:
    return [t.data_ptr() for t in layer._window]


@pytest.mark.parametrize("tokens", [1, 15, 30, 70, 119])
def test_crop(where: Where, tokens: int) -> None:
    layer = filled(where)
    before = [decoded(layer, i) for i in range(2)]
    held = addresses(layer)
    layer.crop(-tokens)
    assert layer.get_seq_length() == 120 - tokens
    for i in range(2):
        torch.testing.assert_close(decoded(layer, i), before[i][:, :, : 120 - tokens])
    n_packed, sinks = layer._lengths()[0], where.settings["sinks"]
    new = torch.randn(2, 2, 1, 64)
    for _ in range(90):  # the window fills again, and pages leave it
        layer.update(new, new)
    assert layer.get_seq_length() == 210 - tokens
    assert layer._lengths()[0] % layer._page == 0  # a page left in part was filled
    if n_packed:  # what was packed before was not coded again
        for i in range(2):
            kept = slice(sinks, sinks + n_packed)
            assert torch.equal(decoded(layer, i)[:, :, kept], before[i][:, :, kept])
    assert torch.equal(decoded(layer, 0)[:, :, -1:], new)
    assert addresses(layer) == held


@pytest.mark.parametrize("most", [1, 5, 60])
def test_chunks_fill_a_page_that_a_crop_has_left_in_part(where: Where, most: int) -> None:
    """Steps by the window and chunks by the stores keep the same codes, and lose nothing."""
    layer = filled(where)
    layer.crop(-61)
    first = layer._lengths()[0]
    assert first % layer._page
    expected = [decoded(layer, i) for i in range(2)]
    new = torch.randn((2, 2, 2, 120, 64), generator=torch.Generator().manual_seed(1))
    for start in range(0, 120, most):
        layer.update(*new[:, :, :, start : start + most])
    n_packed, n_dense = layer._lengths()
    assert n_packed + n_dense == 179
    assert n_packed % layer._page == 0
    assert not layer._window.counts[2].any()
    assert n_dense <= layer._window.k_dense.shape[2]
    for i in range(2):
        got = decoded(layer, i)
        packed = slice(where.settings["sinks"], where.settings["sinks"] + first)
        assert torch.equal(got[:, :, packed], expected[i][:, :, packed])
        torch.testing.assert_close(got[:, :, 59:], new[i], rtol=0.3, atol=1.0)


def test_queries_of_a_prompt_count_when_the_first_page_is_packed_later(where: Where) -> None:
    """A prompt too short to pack: its queries weigh the channels of the page packed in a graph."""
    forward, _ = compiled(where.model)
    cache, unseen = where.cache(), where.cache()
    for c in (cache, unseen):
        where.model(prompt(3), past_key_values=c)
    seen = cache.layers[0]._queries.rms
    window = cache.layers[0]._window
    assert seen is not None
    assert torch.equal(window.k_statistics[2], seen)
    for layer in unseen.layers:
        layer._window.k_statistics[2].zero_()
    for _ in range(100):
        for c in (cache, unseen):
            forward(prompt(1), past_key_values=c)
    assert int(window.counts[0, 0]) > 0
    assert torch.equal(window.k_statistics[2], seen)
    other = unseen.layers[0]._window.k_statistics
    assert torch.equal(window.k_statistics[0], other[0])
    assert not torch.allclose(window.k_statistics[1], other[1], rtol=1e-2)
    cache.reset()
    assert not window.k_statistics[2].any()


def test_batch_operations(where: Where) -> None:
    layer = filled(where)
    before = [decoded(layer, i) for i in range(2)]
    held = addresses(layer)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert addresses(layer) == held
    for i in range(2):
        assert torch.equal(decoded(layer, i), before[i].flip(0))
    layer.batch_repeat_interleave(3)
    for i in range(2):
        assert torch.equal(decoded(layer, i), before[i].flip(0).repeat_interleave(3, 0))
    layer.batch_select_indices(torch.tensor([0, 5]))
    for i in range(2):
        assert torch.equal(decoded(layer, i), before[i].flip(0))
    layer.update(*torch.randn(2, 2, 2, 1, 64))
    assert layer.get_seq_length() == 121


def test_reset_keeps_addresses(where: Where) -> None:
    layer = filled(where)
    held = addresses(layer)
    layer.reset()
    assert layer.get_seq_length() == 0
    fresh = filled(where)
    keys, values = torch.randn((2, 2, 2, 120, 64), generator=torch.Generator().manual_seed(120))
    layer.update(keys[:, :, :100], values[:, :, :100])
    for i in range(100, 120):
        layer.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    assert addresses(layer) == held
    for i in range(2):
        assert torch.equal(decoded(layer, i), decoded(fresh, i))


def test_a_full_cache_says_so(where: Where) -> None:
    cache = where.cache(60)
    decode(where.model, cache, 20)
    with pytest.raises(InputError, match="max_cache_len=60 tokens and holds 60: 1 more"):
        where.model(prompt(1), past_key_values=cache)
    with pytest.raises(InputError, match="holds 0: 61 more"):
        where.model(prompt(61), past_key_values=where.cache(60))


def test_a_graph_that_overflows_is_reported(where: Where) -> None:
    """Mask sizes are asked for before each step of generate(); else the next look says it."""
    options = {"do_sample": False, "compile_config": COMPILE, "max_new_tokens": 40}
    with pytest.raises(InputError, match="holds 60: 1 more"):
        where.model.generate(prompt(), past_key_values=where.cache(60), **options)
    cache = where.cache(60)
    forward, _ = compiled(where.model)
    extra = 1 + cache.layers[0].max_cache_len
    decode(where.model, cache, extra + 200, forward)
    with pytest.raises(InputError, match="did not fit"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_bytes_are_allocated_at_once(where: Where) -> None:
    cache = where.cache()
    decode(where.model, cache, 0)
    before = cache.nbytes
    decode_more = prompt(1)
    for _ in range(90):
        where.model(decode_more, past_key_values=cache)
    assert cache.nbytes == before > 0


def test_settings_that_a_static_cache_cannot_have() -> None:
    tiers = {"importance": (8,), "budget": 5.0}
    for settings in (tiers, {"head_bits": {0: 8}}):
        with pytest.raises(ConfigError, match="max_cache_len"):
            QuantForgeStaticLayer(CacheConfig(**settings), 64)
        with pytest.raises(ConfigError, match="max_cache_len"):
            QuantForgeCache(max_cache_len=64, **settings)
    with pytest.raises(ConfigError, match="max_cache_len must be an integer"):
        QuantForgeStaticLayer(QuantForgeCache().options, 0)
    with pytest.raises(ConfigError, match="offload"):
        QuantForgeCache(max_cache_len=64, offloading=True)
    assert QuantForgeCache(max_cache_len=64).is_compileable
    assert not QuantForgeCache().is_compileable


def test_what_a_static_tensor_refuses(where: Where) -> None:
    layer = filled(where)
    key, value = layer.keys, layer.values
    assert isinstance(key, StaticTensor)
    query = torch.randn(2, 2, 1, 64)
    with pytest.raises(UnsupportedError, match="max_cache_len"):
        key + 1
    with pytest.raises(UnsupportedError, match="max_cache_len"):
        query @ key.mT
    with pytest.raises(UnsupportedError, match="is_causal"):
        F.scaled_dot_product_attention(query, key, value, is_causal=True)
    with pytest.raises(UnsupportedError, match="indexed"):
        key[:, :, :3]
    with pytest.raises(UnsupportedError, match="same QuantForgeCache layer"):
        F.scaled_dot_product_attention(query, key, query)
