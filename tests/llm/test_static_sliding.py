"""Sliding-window and chunked layers of a static cache: a ring that a graph turns."""

from __future__ import annotations

from collections.abc import Iterator
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
from quantforge.llm.ring import ring_tokens, slots_of
from quantforge.llm.sliding import QuantForgeSlidingLayer
from quantforge.llm.static_sliding import QuantForgeStaticSlidingLayer
from tests.llm.conformance import BATCH, DIM, HEADS, dense, states_of
from tests.llm.models import random_model

ROWS: dict[str, Any] = {"window": 16, "page_size": 8, "bits": 8, "layout": "rows"}
PAGES: dict[str, Any] = {"window": 16, "page_size": 64, "bits": 4, "layout": "pages"}
LAYERS: dict[str, tuple[dict[str, Any], int]] = {
    "rows": (ROWS, 40),
    "pages": (PAGES, 150),
    "dense": (ROWS, 12),
}
each_layer = pytest.mark.parametrize(("settings", "window"), LAYERS.values(), ids=LAYERS)
ROOM = 700


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def pair(settings: dict[str, Any], window: int) -> tuple[Any, QuantForgeSlidingLayer]:
    # queries of single steps weigh the channels of a layer that grows, and a graph sees none
    options = CacheConfig(**settings, equalizer=False)
    static = QuantForgeStaticSlidingLayer(options, ROOM, window)
    return static, QuantForgeSlidingLayer(options, window)


def attend(layer: Any, n: int, seed: int, window: int, batch: int = BATCH) -> torch.Tensor:
    """Append n tokens and return what their queries get."""
    generator = torch.Generator().manual_seed(seed)
    seen = int(layer.get_seq_length())
    columns, offset = layer.get_mask_sizes(n)
    key, own = torch.arange(columns) + offset, torch.arange(seen, seen + n)[:, None]
    mask = ((key <= own) & (key > own - window))[None, None]
    query = torch.randn(batch, 4 * HEADS, n, DIM, generator=generator)
    k, v = layer.update(*states_of(n, seed=seed, batch=batch))
    assert k.shape[2] == columns or not seen
    out = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True)
    return out.as_subclass(torch.Tensor)


def alike(layers: Any, steps: list[int], window: int, batch: int = BATCH, seed: int = 0) -> None:
    for i, n in enumerate(steps):
        got, expected = (attend(layer, n, seed + i, window, batch) for layer in layers)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert int(layers[0].get_seq_length()) == layers[1].get_seq_length()


# ---- the layer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "steps"),
    [
        ("rows", [60, *[1] * 100]),
        ("rows", [1] * 90),
        ("rows", [200, 30, *[1] * 30, 100, *[1] * 60]),
        ("pages", [140, *[1] * 66, 70, 100, *[1] * 66]),
        ("dense", [60, *[1] * 40, 30, *[1] * 20]),
    ],
)
def test_attends_to_what_a_layer_that_grows_attends_to(layer: str, steps: list[int]) -> None:
    settings, window = LAYERS[layer]
    layers = pair(settings, window)
    alike(layers, steps, window)
    layers[0].reset()
    assert layers[0].get_seq_length() == 0
    alike((layers[0], pair(settings, window)[1]), [60, 1, 1], window)


@each_layer
def test_goes_round_in_the_same_memory(settings: dict[str, Any], window: int) -> None:
    layer, _ = pair(settings, window)
    attend(layer, 60, 0, window)
    held, size = [t.data_ptr() for t in layer._window], layer.nbytes
    for i in range(400):
        layer.update(*states_of(1, seed=i))
    assert [t.data_ptr() for t in layer._window] == held
    assert layer.nbytes == size
    assert int(layer._window.counts[4, 0]) > 0, "it went round"
    assert layer.get_seq_length() == 460


@each_layer
def test_a_page_of_tokens_can_be_removed(settings: dict[str, Any], window: int) -> None:
    """Those of a rejected draft, after any number of turns."""
    layer, _ = pair(settings, window)
    attend(layer, 60, 0, window)
    for i in range(400):
        layer.update(*states_of(1, seed=i))
    before = [dense(t.view()) for t in layer._stores()]
    for _ in range(2):
        layer.update(*states_of(5, seed=1))
        layer.crop(-5)
        assert layer.get_seq_length() == 460
        for old, store in zip(before, layer._stores(), strict=True):
            kept = store.view()
            n = min(kept.shape[2], old.shape[2])
            # codes may have taken the place of exact tokens
            error = (dense(kept)[:, :, -n:] - old[:, :, -n:]).norm()
            assert error <= 0.12 * old.norm()
            assert kept.shape[2] == window - 1
    with pytest.raises(UnsupportedError, match="gone"):
        layer.crop(-400)
    assert layer.get_seq_length() == 460
    with pytest.raises(InputError, match="at most 460"):
        layer.crop(-461)


@each_layer
def test_recorded_tokens_come_back(settings: dict[str, Any], window: int) -> None:
    layers = pair(settings, window)
    for layer in layers:
        layer.activate_past_recording()
    alike(layers, [60], window)
    for removed in (0, 7):
        for layer in layers:
            layer.crop(-removed)
        alike(layers, [1] * 40, window, seed=removed)
    if window == 40:
        alike(layers, [1] * 60, window)
    late, _ = pair(settings, window)
    attend(late, 200, 0, window)
    with pytest.raises(UnsupportedError, match="activate_past_recording"):
        late.crop(-1)


@each_layer
@pytest.mark.parametrize(
    ("name", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0]), 3),
        ("batch_select_indices", torch.tensor([1]), 1),
        ("batch_repeat_interleave", 2, 6),
    ],
)
def test_batch_operations(
    settings: dict[str, Any], window: int, name: str, argument: Any, rows: int
) -> None:
    layers = pair(settings, window)
    alike(layers, [160, *[1] * 10], window)
    for layer in layers:
        getattr(layer, name)(argument)
    alike(layers, [1] * 20, window, rows)


def test_a_full_layer_says_so() -> None:
    layer, _ = pair(ROWS, 40)
    attend(layer, ROOM - 1, 0, 40)
    attend(layer, 1, 0, 40)
    with pytest.raises(InputError, match="holds 700: 1 more do not fit"):
        layer.get_mask_sizes(1)
    with pytest.raises(InputError, match="holds 700: 1 more do not fit"):
        layer.update(*states_of(1))
    assert layer.get_seq_length() == ROOM
    with pytest.raises(ConfigError, match="sliding_window"):
        QuantForgeStaticSlidingLayer(CacheConfig(), ROOM, 0)


def test_a_ring_has_room_for_the_window_and_a_step() -> None:
    assert ring_tokens(window=4096, recent=128, page=64) == (4095 + 64 - 128 + 1) + 2 * 64
    assert ring_tokens(window=10, recent=128, page=64) == 128
    assert slots_of(0, 7, pages=4) == [0, 1, 2, 3, 1, 2, 3]


# ---- models ----------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"sinks": 4, "window": 8, "page_size": 8, "layout": "rows"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("sdpa", {"sliding_window": 48, "num_hidden_layers": 1}),
    "gemma3_text": ("quantforge", {}),
    "gpt_oss": ("quantforge", {}),
    "llama4_text": ("sdpa", {}),
}
COMPILE = CompileConfig(fullgraph=True, mode=None, backend="eager")
COMPILE._compile_all_devices = True


def ids_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 128, (2, n), generator=torch.Generator().manual_seed(seed))


def decode(model: Any, cache: Any, forward: Any, steps: int) -> torch.Tensor:
    first = model(ids_of(60), past_key_values=cache).logits[:, -1:]
    later = [forward(ids_of(1, i), past_key_values=cache).logits for i in range(steps)]
    return torch.cat([first, *later], 1)


@pytest.mark.parametrize("family", MODELS)
def test_one_graph_decodes_as_the_cache_that_grows(family: str) -> None:
    """Windows and chunks are left many times, and the ring goes round."""
    attention, changes = MODELS[family]
    model = random_model(family, attention, **changes)
    static = QuantForgeCache(model.config, max_cache_len=256, **SETTINGS)
    growing = QuantForgeCache(model.config, **SETTINGS)
    assert isinstance(static.layers[0], QuantForgeStaticSlidingLayer)
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(model.__call__, backend=counter, fullgraph=True)
    got = decode(model, static, forward, 70)
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(got, decode(model, growing, model, 70), rtol=1e-3, atol=1e-3)
    assert int(static.layers[0]._window.counts[4, 0]) > 0, "it went round"
    assert int(static.get_seq_length()) == growing.get_seq_length() == 130
    assert static.report().layers[0].sinks == 0


def test_a_chunk_in_a_graph_sees_what_it_moves() -> None:
    """More tokens at a time than a page: the first of them attend to pages that the last take."""
    model = random_model("mistral", sliding_window=48, num_hidden_layers=1)
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(model.__call__, backend=counter, fullgraph=True)
    settings = SETTINGS | {"max_cache_len": 256, "bits": 8}
    caches = [QuantForgeCache(model.config, **settings) for _ in range(2)]
    outs: list[list[torch.Tensor]] = [[], []]
    for out, cache, run in zip(outs, caches, (forward, model), strict=True):
        model(ids_of(30), past_key_values=cache)
        for i in range(3):
            out.append(run(ids_of(40, i), past_key_values=cache).logits)
        out.append(model(ids_of(1), past_key_values=cache).logits)
    assert counter.frame_count == 1
    # chunks by the stores measure again when all that was packed has left the window
    torch.testing.assert_close(outs[0][0], outs[1][0], rtol=1e-3, atol=1e-3)
    for got, expected in zip(outs[0], outs[1], strict=True):
        divergence = (expected.softmax(-1) * (expected.log_softmax(-1) - got.log_softmax(-1))).sum(
            -1
        )
        assert divergence.mean() < 0.02


def test_generate_with_left_padding_compiles_once() -> None:
    model = random_model("gemma3_text")
    ids, mask = ids_of(70), torch.ones(2, 70, dtype=torch.int64)
    mask[0, :13] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    options = {"max_new_tokens": 60, "do_sample": False}
    cache = QuantForgeCache(model.config, max_cache_len=200, **SETTINGS)
    got = model.generate(**inputs, past_key_values=cache, compile_config=COMPILE, **options)
    assert counters["stats"]["unique_graphs"] == 1
    growing = QuantForgeCache(model.config, **SETTINGS)
    expected = model.generate(**inputs, past_key_values=growing, **options)
    assert torch.equal(got, expected)
    cache.reset()
    again = model.generate(**inputs, past_key_values=cache, compile_config=COMPILE, **options)
    assert torch.equal(again, got)
    assert counters["stats"]["unique_graphs"] == 1
