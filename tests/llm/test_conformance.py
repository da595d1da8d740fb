"""Every public name of transformers' caches, called on ours and on theirs.

Each test says which names it covers (layers: `test_conformance_layers`). A name, a class or an
argument that upstream adds and that no test covers fails the last tests here, on every supported
version of transformers.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from quantforge import QuantForgeCache
from quantforge.llm.latent import LatentLayer
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.sliding import QuantForgeSlidingLayer
from tests.llm import test_conformance_layers
from tests.llm.conformance import (
    BATCH,
    COVERED,
    DIM,
    HEADS,
    assert_close,
    content,
    covers,
    dense,
    states_of,
)
from tests.llm.models import config_of

assert test_conformance_layers.each_kind, "imported for what it covers"

# ---- caches, name by name --------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"sinks": 4, "window": 16, "page_size": 8, "bits": 8}
FAMILIES = ("llama", "gemma3_text", "qwen3_next")


def _caches(family: str) -> tuple[QuantForgeCache, DynamicCache]:
    config = config_of(family)
    return QuantForgeCache(config, **SETTINGS), DynamicCache(config=config)


def _attention_layers(cache: Cache) -> list[int]:
    return [i for i, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin)]


def _fill(cache: Cache, n: int = 60, seed: int = 0) -> list[Any]:
    return [cache.update(*states_of(n, seed=seed + i), i) for i in _attention_layers(cache)]


def _filled(family: str) -> tuple[QuantForgeCache, DynamicCache]:
    pair = _caches(family)
    for cache in pair:
        _fill(cache)
    return pair


@covers(
    "get_query_offset", "is_linear", "is_dummy", "is_initialized", "batch_size",
    "is_recording_past", "max_cache_len", "max_batch_size",
)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_answer_alike(family: str) -> None:
    pair = _caches(family)
    for state in ("empty", "filled", "recording", "grown"):
        answers = []
        for cache in pair:
            if state == "recording":
                cache.activate_past_recording()
            if state in ("filled", "grown"):
                _fill(cache, 60 if state == "filled" else 1)
            indices = _attention_layers(cache)
            answers.append(
                {
                    "len": len(cache),
                    "seq": [cache.get_seq_length(i) for i in indices],
                    "seq 0": cache.get_seq_length(),
                    "beyond": (cache.get_seq_length(99), cache.get_mask_sizes(5, 99)),
                    "max": [cache.get_max_length(i) for i in (None, *indices, 99)],
                    "mask": [cache.get_mask_sizes(q, i) for i in indices for q in (1, 9)],
                    "offset": [cache.get_query_offset(i) for i in indices],
                    "recording": [
                        getattr(cache, "is_recording_past", lambda _: None)(i) for i in indices
                    ],
                }
                | {
                    name: getattr(cache, name)
                    for name in (
                        "is_compileable", "is_croppable", "is_sliding", "is_linear", "is_dummy",
                        "is_initialized", "batch_size",
                    )
                    if hasattr(Cache, name)
                }
            )  # fmt: skip
        assert answers[0] == answers[1], state


def test_a_cache_without_config_answers_as_theirs() -> None:
    for cache in (QuantForgeCache(), DynamicCache()):
        assert len(cache) == 0
        assert cache.get_seq_length() == 0
        assert cache.get_mask_sizes(4, 0) == (4, 0)
        assert cache.get_max_length(0) == -1
        assert not cache.is_compileable
        assert not cache.is_initialized
        assert list(cache) == []
        cache.update(*states_of(3), 2)
        assert [cache.get_seq_length(i) for i in range(3)] == [0, 0, 3]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_iteration_yields_keys_values_and_window(family: str) -> None:
    ours, theirs = _filled(family)
    for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(a[:2], b[:2], 0.01)
        assert (a[2] is None) == (b[2] is None)
        assert a[2] is None or a[2] == b[2]
        assert torch.equal(dense(ours.layers[layer].keys), dense(a[0]))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_caches_pass_calls_to_all_layers(family: str) -> None:
    for name, argument in (
        ("crop", -7), ("reorder_cache", torch.tensor([1, 1, 0])), ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([0, 3])),
    ):  # fmt: skip
        pair = _caches(family)
        for cache in pair:
            cache.activate_past_recording()
            _fill(cache)
            if name == "batch_select_indices":
                cache.batch_repeat_interleave(2)
            getattr(cache, name)(argument)
        for ours, theirs in zip(pair[0].layers, pair[1].layers, strict=True):
            assert_close(content(ours), (theirs.keys, theirs.values), 0.01)
        pair[0].reset()
        assert pair[0].get_seq_length() == 0
        assert _fill(pair[0])


@covers("early_initialization")
def test_early_initialization_chooses_codes() -> None:
    for cache in _caches("gemma3_text"):
        cache.early_initialization(
            batch_size=BATCH, num_heads=HEADS, head_dim=DIM, dtype=torch.float32, device="cpu"
        )
        assert cache.is_initialized
        assert cache.get_seq_length() == 0
        _fill(cache)
        assert cache.get_seq_length() == 60
    other, _ = _caches("llama")
    other.early_initialization(
        batch_size=1, num_heads=1, head_dim=16, dtype=torch.float32, device="cpu"
    )
    _fill(other)  # dims that turn out otherwise are chosen again
    assert content(other.layers[0])[0].shape == (BATCH, HEADS, 60, DIM)


@covers("offload", "prefetch")
def test_offload_of_a_layer_by_the_cache() -> None:
    for cache in _filled("gemma3_text"):
        before = content(cache.layers[0])
        cache.offload(0, only_non_sliding=False)
        assert all(torch.equal(a, b) for a, b in zip(content(cache.layers[0]), before, strict=True))


@pytest.mark.gpu
def test_offloading_cache_decodes_the_same() -> None:
    """Layers go to the CPU behind each update and come back ahead of the next."""
    states = [[x.cuda() for x in states_of(n, seed=n)] for n in (60, 1, 1, 30)]
    outputs = []
    for offloading in (False, True):
        cache = QuantForgeCache(config_of("llama"), offloading=offloading, **SETTINGS)
        outputs.append(
            [dense(cache.update(*new, layer)[0]).cpu() for new in states for layer in range(2)]
        )
        if offloading:
            assert cache.layers[1].keys.packed.device.type == "cpu"
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@covers(
    "has_previous_state", "get_conv_state", "update_conv_state", "get_recurrent_state",
    "update_recurrent_state", "update_indexer",
)  # fmt: skip
def test_states_of_linear_layers_are_transformers_own() -> None:
    ours, theirs = _caches("qwen3_next")
    linear = next(i for i in range(len(theirs)) if i not in _attention_layers(theirs))
    attention = _attention_layers(theirs)[0]
    conv, recurrent = torch.randn(BATCH, 8, 4), torch.randn(BATCH, 2, 8, 8)
    for cache in (ours, theirs):
        assert not cache.has_previous_state(linear)
        cache.update_conv_state(conv, linear)
        cache.update_recurrent_state(recurrent, linear)
        assert cache.has_previous_state(linear)
        assert cache.has_previous_state()
        if hasattr(Cache, "get_conv_state"):
            assert torch.equal(cache.get_conv_state(linear), conv)
            assert torch.equal(cache.get_recurrent_state(linear), recurrent)
        for call in (
            lambda c=cache: c.has_previous_state(attention),
            lambda c=cache: c.update_conv_state(conv, attention),
            lambda c=cache: c.update_recurrent_state(recurrent, attention),
            lambda c=cache: c.update_indexer(conv, attention),
        ):
            with pytest.raises(ValueError, match=r"layer|Attention"):
                call()
    assert type(ours.layers[linear]) is type(theirs.layers[linear])
    assert ours.nbytes >= conv.numel() * 4 + recurrent.numel() * 4
    twin = copy.deepcopy(ours).to("cpu")
    assert torch.equal(twin.layers[linear].conv_states[0], conv)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_independent_and_know_the_same_config(family: str) -> None:
    ours, _ = _filled(family)
    index = _attention_layers(ours)[0]
    before = content(ours.layers[index])
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    ours.reset()
    for twin in twins:
        assert all(
            torch.equal(a, b) for a, b in zip(content(twin.layers[index]), before, strict=True)
        )
        twin.update(*states_of(1), index)
        assert twin.get_seq_length(index) == 61
    assert twins[0]._config is ours._config, "whose attention function may change"


def test_to_moves_all_layers(device: torch.device) -> None:
    ours, _ = _filled("gemma3_text")
    before = [content(layer) for layer in ours.layers]
    assert ours.to(device) is ours
    for layer, contents in zip(ours.layers, before, strict=True):
        assert layer.device.type == device.type
        for a, b in zip(content(layer), contents, strict=True):
            assert a.device.type == device.type
            torch.testing.assert_close(a.cpu(), b)
    for layer, contents in zip(ours.to("cpu").layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(content(layer), contents, strict=True))
    ours.to(device).update(*(x.to(device) for x in states_of(1)), 0)
    assert ours.get_seq_length() == 61


# ---- encoder-decoder -------------------------------------------------------------------------


@covers("check_dynamic_cache")
def test_encoder_decoder_caches_hold_ours() -> None:
    pair = [
        EncoderDecoderCache(make(), make())
        for make in (lambda: QuantForgeCache(**SETTINGS), lambda: DynamicCache())
    ]
    for cache in pair:
        for layer in range(2):
            cache.self_attention_cache.update(*states_of(40), layer)
            cache.cross_attention_cache.update(*states_of(60, seed=1), layer)
        cache.check_dynamic_cache("crop")
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([2, 1, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 5]))
    ours, theirs = pair
    names = ("is_sliding", "is_linear", "is_dummy", "is_compileable", "is_croppable")
    for name in names:
        if name in vars(EncoderDecoderCache):  # inherited ones look for layers it has not
            assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs) == 2
    assert ours.get_seq_length() == theirs.get_seq_length() == 37
    assert ours.get_max_length() == theirs.get_max_length()
    assert ours.get_mask_sizes(5, 0) == theirs.get_mask_sizes(5, 0)
    for a, b in zip(ours, theirs, strict=True):
        assert_close((a[0], a[1], a[3], a[4]), (b[0], b[1], b[3], b[4]), 0.01)
    ours.activate_past_recording()
    ours.reset()
    assert ours.get_seq_length() == 0


# ---- nothing is unknown ----------------------------------------------------------------------

KNOWN_CLASSES = {
    "BaseQuantizedLayer", "Cache", "CacheLayerMixin", "DFlashCache", "DummyLayer", "DynamicCache",
    "DynamicIndexedLayer", "DynamicLayer", "DynamicSlidingWindowLayer", "EncoderDecoderCache",
    "Fp8QuantizedLayer", "HQQQuantizedLayer", "KVSharingDict",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer", "LinearAttentionAndStaticFullAttentionLayer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer", "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer", "MtpCache", "QuantizedCache", "QuantizedLayer", "QuantoQuantizedLayer",
    "StaticCache", "StaticIndexedLayer", "StaticLayer", "StaticSlidingWindowLayer",
    "SlidingWindowCache",
}  # fmt: skip
"""Of `transformers.cache_utils`: a layer type that upstream adds wants a decision (`SLIDING` and
`QuantForgeCache._layers_of`), and this list."""
COMPARED = (
    Cache, DynamicCache, StaticCache, EncoderDecoderCache, CacheLayerMixin, DynamicLayer,
    DynamicSlidingWindowLayer, StaticLayer, cache_utils.StaticSlidingWindowLayer,
)  # fmt: skip
NOT_TAKEN = {"ddp_cache_data"}
"""Arguments of `DynamicCache` for gathering replicas, which have no codes."""


def _public(cls: type) -> Iterator[str]:
    return (name for name in dir(cls) if not name.startswith("_"))


def test_no_upstream_name_is_unknown() -> None:
    for cls in COMPARED:
        unknown = set(_public(cls)) - set(COVERED)
        assert not unknown, f"no test here calls {cls.__name__}.{sorted(unknown)}"
    classes = {
        name
        for name, cls in vars(cache_utils).items()
        if isinstance(cls, type) and cls.__module__ == cache_utils.__name__
    }
    assert not classes - KNOWN_CLASSES, "transformers has new kinds of caches or layers"


def test_no_upstream_argument_is_unknown() -> None:
    pairs = [
        (QuantForgeCache, DynamicCache),
        (QuantForgeLayer, DynamicLayer),
        (LatentLayer, DynamicLayer),
        (QuantForgeSlidingLayer, DynamicSlidingWindowLayer),
    ]
    for ours, theirs in pairs:
        for name in (*_public(theirs), *(("__init__",) if theirs is DynamicCache else ())):
            method = getattr(theirs, name)
            if not callable(method) or isinstance(method, type):
                continue
            expected = inspect.signature(method).parameters
            got = inspect.signature(getattr(ours, name)).parameters
            open_ended = any(p.kind is p.VAR_KEYWORD for p in got.values())
            missing = [p for p in expected if p not in got and not open_ended]
            assert set(missing) <= NOT_TAKEN | {"args", "kwargs"}, f"{ours.__name__}.{name}"
