"""Tiers of important tokens and heads with bits of their own, against the same codes decoded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quantforge import QuantForgeCache
from quantforge.errors import ConfigError
from quantforge.llm.fidelity import decode_logits
from quantforge.llm.heads import HeadGroups
from quantforge.llm.importance import Slots, choose
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig
from quantforge.llm.paged import PagedRows
from quantforge.llm.segments import SegmentedTensor
from quantforge.tensor import QuantTensor
from tests.llm.models import SETTINGS, DenseReferenceCache, random_model
from tests.llm.test_cache import assert_same_logits, tokens

TIERS: dict[str, Any] = {**SETTINGS, "bits": 2, "importance": (4, 8), "budget": 4.5}
HEADS: dict[str, Any] = {**SETTINGS, "bits": 2, "head_bits": {1: (8, 4)}}
SPLIT = pytest.mark.parametrize("settings", [TIERS, HEADS], ids=["tiers", "heads"])


# ---- choosing, and where rows are --------------------------------------------------------------


def test_choose_by_hand() -> None:
    mass = torch.tensor([[[0.1, 0.5, 0.2, 0.9, 0.3], [0.9, 0.1, 0.2, 0.3, 0.4]]])
    assert choose(mass, [2, 2, 1]).tolist() == [[[0, 1, 0, 2, 1], [2, 0, 0, 1, 1]]]
    assert choose(mass, [5, 0, 0]).tolist() == [[[0] * 5] * 2]


def test_slots_by_hand() -> None:
    first = torch.tensor([[[0, 1, 0, 0]]], dtype=torch.uint8)
    second = torch.tensor([[[2, 0, 1, 0]]], dtype=torch.uint8)
    slots = Slots(first[:, :, :0]).appended(first, [3, 1, 0]).appended(second, [2, 1, 1])
    assert slots.rows == (5, 2, 1)
    assert slots.places(0).tolist() == [[[0, 2, 3, 5, 7]]]
    assert slots.places(1).tolist() == [[[1, 6]]]
    assert slots.row_of.tolist() == [[[0, 5, 1, 2, 7, 3, 6, 4]]]
    inside = slots.cropped(3)  # one token of the second block is left
    assert (inside.alive, inside.rows, inside.dead) == (5, (5, 2, 1), ((5, 8),))
    assert inside.places(0).tolist() == [[[0, 2, 3, -1, -1]]]
    assert inside.row_of.tolist() == [[[0, 5, 1, 2, 7]]]
    grown = inside.appended(first, [3, 1, 0])
    assert grown.alive == 9
    assert grown.places(1).tolist() == [[[1, -1, 6]]]
    assert grown.cropped(4).rows == inside.rows
    assert grown.cropped(5).rows == slots.cropped(4).rows == (3, 1, 0)
    assert grown.cropped(9).alive == 0


def test_head_groups_by_hand() -> None:
    groups = HeadGroups.of(CacheConfig(bits=2, head_bits={2: 4, 0: (8, 2), 3: 2}), 4)
    assert groups is not None
    assert groups.heads == ((0,), (1, 3), (2,))
    x = torch.arange(4)[None, :, None]
    assert groups.join([groups.part(x, i) for i in range(3)]).tolist() == x.tolist()
    q = torch.arange(8)[None, :, None]
    parts = [groups.part_of_queries(q, i) for i in range(3)]
    assert parts[1].flatten().tolist() == [2, 3, 6, 7]
    assert groups.join_queries(parts).tolist() == q.tolist()
    assert HeadGroups.of(CacheConfig(bits=2, head_bits={1: 2}), 4) is None
    with pytest.raises(ConfigError, match=r"key heads \[4\]"):
        HeadGroups.of(CacheConfig(head_bits={4: 8}), 4)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4, "importance": (2,), "budget": 3.0}, "rising order"),
        ({"bits": 2, "importance": (4, 3), "budget": 2.5}, "rising order"),
        ({"bits": 2, "importance": (4,)}, "belong together"),
        ({"budget": 2.5}, "belong together"),
        ({"bits": 2, "importance": (4,), "budget": 1.5}, "budget must lie"),
        ({"bits": 2, "importance": (4,), "budget": 2.5, "head_bits": {0: 8}}, "exclude each other"),
        ({"bits": 2, "importance": ((4, 4, 4),), "budget": 2.5}, "pair"),
        ({"head_bits": {0: 9}}, "bits"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig(**settings)


def test_budgets_beyond_reach_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2\.156 with their scales"):
        CacheConfig(bits=2, importance=(4,), budget=2.1).shares(128, 128)
    with pytest.raises(ConfigError, match="raise every token"):
        CacheConfig(bits=2, importance=(3,), budget=3.5).shares(128, 128)


def test_settings_survive_json() -> None:
    options = CacheConfig(bits=[4, 2], importance=[[8, 4]], budget=3.5)  # type: ignore[arg-type]
    assert options == CacheConfig(bits=(4, 2), importance=((8, 4),), budget=3.5)
    assert CacheConfig(head_bits={"1": [8, 4]}).head_bits == {1: (8, 4)}  # type: ignore[dict-item]


# ---- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("importance", "budget"), [((4,), 2.5), ((4, 8), 2.75), ((8,), 3.0)])
def test_packed_tokens_stay_within_the_budget(importance: Any, budget: float) -> None:
    layer = QuantForgeLayer(CacheConfig(bits=2, importance=importance, budget=budget))
    dim, heads = 128, 2
    x = torch.randn(1, heads, 3000, dim, generator=torch.Generator().manual_seed(0))
    layer.update(x[:, :, :2000], x[:, :, :2000])
    for start in range(2000, 3000, 100):
        layer.update(x[:, :, start : start + 100], x[:, :, start : start + 100])
    keys, values = layer.keys, layer.values
    used = sum(s.packed.numel() + 2 * s.scales.numel() for s in (*keys.sources, *values.sources))
    bits = 8 * (used + keys.places.nbytes) / (2 * heads * keys.n_packed * dim)
    assert budget - 0.02 < bits <= budget
    dense = 2 * 4 * keys.dense.shape[2] * heads * dim
    assert used + dense < layer.nbytes < 1.3 * (used + dense)  # buffers have room to grow
    once = QuantForgeLayer(layer.options)
    once.update(x.bfloat16(), x.bfloat16())
    nbytes = once.nbytes
    packed, buffered = once._keys.n_packed, once._keys.dense.shape[2]
    bytes_per_number = (packed * budget + buffered * 16) / 8 / 3000
    assert nbytes / (2 * heads * 3000 * dim) == pytest.approx(bytes_per_number, rel=0.01)


# ---- attention ----------------------------------------------------------------------------------


@SPLIT
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_agrees_with_the_dense_reference(settings: Any, attention: str) -> None:
    model = random_model("llama", attention)
    ours, reference = QuantForgeCache(**settings), DenseReferenceCache(**settings)
    assert_same_logits(
        decode_logits(model, tokens(2, 120), 80, ours),
        decode_logits(model, tokens(2, 120), 80, reference),
    )
    key = ours.layers[0].keys
    assert isinstance(key, SegmentedTensor)
    assert len(key.sources) == (3 if settings is TIERS else 2)


@SPLIT
@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 25}],
    ids=["greedy", "beams", "lookup", "chunked"],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_gives_the_reference_tokens(
    settings: Any, arguments: dict[str, Any], attention: str
) -> None:
    model = random_model("llama", attention)
    batch = 1 if "prompt_lookup_num_tokens" in arguments else 2
    ids = tokens(batch, 60)
    mask = torch.ones_like(ids)
    if batch == 2:
        mask[0, :23] = 0
    outputs = [
        model.generate(
            ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0,
            past_key_values=cache, **arguments,
        )
        for cache in (QuantForgeCache(**settings), DenseReferenceCache(**settings))
    ]  # fmt: skip
    assert torch.equal(*outputs)


@SPLIT
@pytest.mark.parametrize("removed", [3, 20, 45, 60])
def test_kept_tokens_keep_their_contribution_after_a_crop(settings: Any, removed: int) -> None:
    """Recent tokens go, then packed ones: a part of a block, or whole blocks."""
    layer = QuantForgeLayer(CacheConfig(**settings))
    states = torch.randn(2, 2, 170, 32, generator=torch.Generator().manual_seed(0))
    new = torch.randn(2, 2, 40, 32, generator=torch.Generator().manual_seed(1))
    layer.update(states[:, :, :120], -states[:, :, :120])
    layer.update(states[:, :, 120:], -states[:, :, 120:])
    before = layer.keys.dequantize(), layer.values.dequantize()
    layer.crop(-removed)
    for x, y in zip((layer.keys, layer.values), before, strict=True):
        assert torch.equal(x.dequantize(), y[:, :, :-removed])
    layer.update(new, new)
    keys, values = layer.keys, layer.values
    kept = 170 - removed
    assert torch.equal(keys.dequantize()[:, :, :kept][:, :, :100], before[0][:, :, :100])
    query = torch.randn(2, 8, 5, 32)
    allowed = torch.rand(2, 1, 5, kept + 40) < 0.8
    for mask in (None, allowed, torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)):
        ours = F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
        dense = (keys.dequantize(), values.dequantize())
        theirs = F.scaled_dot_product_attention(query, *dense, mask, enable_gqa=True)
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@SPLIT
def test_batches_are_selected_and_repeated(settings: Any) -> None:
    layer = QuantForgeLayer(CacheConfig(**settings))
    x = torch.randn(3, 2, 150, 32, generator=torch.Generator().manual_seed(0))
    layer.update(x, x)
    before = layer.keys.dequantize()
    layer.batch_select_indices(torch.tensor([2, 0]))
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.keys.dequantize(), before[[2, 2, 0, 0]])
    twin = copy.deepcopy(layer)
    layer.update(x[[0, 0, 1, 1], :, :40], x[[0, 0, 1, 1], :, :40])
    assert twin.get_seq_length() == 150
    assert layer.get_seq_length() == layer.keys.shape[2] == 190


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "split",
    [{"importance": (4,), "budget": 3.0}, {"importance": (4, 8), "budget": 3.0},
     {"head_bits": {0: 4}}, {"head_bits": {1: (8, 4)}}],
    ids=["tiers", "with rows", "heads", "with rows of heads"],
)  # fmt: skip
def test_pages_of_several_codes(split: Any, padded: bool, attention: str) -> None:
    """What has no pages, 8 bits, lies in rows beside them."""
    model = random_model("llama", attention, head_dim=128)
    ids, settings = tokens(2, 110), {**SETTINGS, "bits": 2, **split}
    mask = torch.ones(2, 110, dtype=torch.long)
    mask[0, : 17 * padded] = 0
    logits, sources = [], []
    for cache in (
        QuantForgeCache(layout="pages", **settings),
        DenseReferenceCache(layout="rows", **settings),
    ):
        with torch.no_grad():
            model(ids[:, :80], attention_mask=mask[:, :80], past_key_values=cache)
            for i in range(80, 110):
                out = model(
                    ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache
                )
        logits.append(out.logits.log_softmax(-1))
        sources.append(type(cache.layers[0].keys.source))
    assert_same_logits(*logits)
    assert sources == [PagedRows, QuantTensor]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "split",
    [{"importance": (4,), "budget": 2.5}, {"importance": (4, 8), "budget": 2.5},
     {"head_bits": {0: 4}}, {"head_bits": {1: (8, 4)}}],
    ids=["tiers", "with rows", "heads", "with rows of heads"],
)  # fmt: skip
def test_several_codes_on_cuda(split: Any, dtype: torch.dtype) -> None:
    model = random_model("llama", head_dim=128).to("cuda", dtype)
    ids, settings = tokens(2, 330).cuda(), {**SETTINGS, "bits": 2, **split}
    ours = QuantForgeCache(**settings)
    got = decode_logits(model, ids, 290, ours)
    want = decode_logits(model, ids, 290, DenseReferenceCache(layout="rows", **settings))
    assert isinstance(ours.layers[0].keys.source, PagedRows)
    divergence = (want.exp() * (want - got)).sum(-1)
    assert divergence.median() < 2e-3


# ---- what is important ---------------------------------------------------------------------------


def test_tokens_that_the_last_queries_attend_to_get_more_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = QuantForgeLayer(CacheConfig(**TIERS))
    keys = torch.randn(1, 2, 100, 32, generator=generator)
    query = torch.randn(1, 4, 100, 32, generator=generator)
    wanted = {0: [11, 40, 63], 1: [7, 30, 31]}
    for head, places in wanted.items():
        keys[0, head, places] = 6 * F.normalize(query[0, 2 * head, -1], dim=-1)
    query[0, 1], query[0, 3] = query[0, 0], query[0, 2]  # both query heads of a key head
    query[:, :, -16:] = query[:, :, -1:]
    key, value = layer.update(keys, keys)
    F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    places = layer.keys.places
    for head, expected in wanted.items():
        tiers = places.tiers[0, head]
        assert all(tiers[place - TIERS["sinks"]] == 2 for place in expected)
    error = (layer.keys.dequantize() - keys).norm(dim=-1) / keys.norm(dim=-1)
    for head, expected in wanted.items():
        assert error[0, head, expected].max() < 0.02
    assert error[0, 0, 4:80].mean() > 0.1


def test_importance_buys_more_than_bits_for_all() -> None:
    """Where few tokens get most of the attention, 2 bits with tiers beat 4 bits, in fewer bytes."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 600, 64, generator=generator) for _ in range(2))
    query = torch.randn(1, 4, 600, 64, generator=generator)
    directions = query[:, ::2, -1:]  # of the topic that the last queries share
    keys[:, :, 20:400:20] += 4 * directions
    query[:, :, -40:] = 0.3 * query[:, :, -40:] + directions.repeat_interleave(2, 1)
    errors, sizes = [], []
    for settings in ({"bits": 4}, {"bits": 2, "importance": (8,), "budget": 3.0}):
        layer = QuantForgeLayer(CacheConfig(**{**SETTINGS, **settings}))
        attended = layer.update(keys[:, :, :-1], values[:, :, :-1])
        F.scaled_dot_product_attention(query[:, :, :-1], *attended, is_causal=True, enable_gqa=True)
        last = (query[:, :, -1:], keys[:, :, -1:], values[:, :, -1:])
        ours = F.scaled_dot_product_attention(last[0], *layer.update(*last[1:]), enable_gqa=True)
        exact = F.scaled_dot_product_attention(last[0], keys, values, enable_gqa=True)
        errors.append(float((ours - exact).norm() / exact.norm()))
        sizes.append(layer.nbytes)
    assert errors[1] < 0.7 * errors[0]
    assert sizes[1] < 0.85 * sizes[0]
