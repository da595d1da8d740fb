"""`generate()` in all its forms: token by token what a cache that fake-quantizes gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from quantforge import QuantForgeCache
from quantforge.llm.layer import crop_takes_lengths
from quantforge.llm.segments import SegmentedTensor
from quantforge.llm.sliding import QuantForgeSlidingLayer
from tests.llm.models import SETTINGS, random_model
from tests.llm.reference import FakeQuantCache

CACHE: dict[str, Any] = SETTINGS | {"equalizer": False}
PROMPT, NEW = 60, 16
LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rows": ("llama", {}, {}),
    "pages": ("llama", {"head_dim": 64}, {"layout": "pages"}),
    "sliding": ("qwen3_mixed", {}, {}),
    "sliding pages": ("qwen3_mixed", {"head_dim": 64}, {"layout": "pages"}),
}
"""A model, and where its cache keeps old tokens."""
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def tokens(batch: int = 1, length: int = PROMPT, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 128, (batch, length), generator=generator)


def pair(model: Any, settings: dict[str, Any]) -> tuple[QuantForgeCache, FakeQuantCache]:
    return (
        QuantForgeCache(model.config, **CACHE, **settings),
        FakeQuantCache(model.config, **CACHE, **settings),
    )


def generate(model: Any, ids: torch.Tensor, cache: Any, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(7)
    arguments = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0} | arguments
    return model.generate(ids, past_key_values=cache, **arguments)


def assert_packed(cache: QuantForgeCache) -> None:
    assert all(isinstance(layer.keys, SegmentedTensor) for layer in cache.layers)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked": {"prefill_chunk_size": 25},
}


@pytest.mark.parametrize(
    ("layout", "attention"),
    [
        *(("rows", name) for name in ("sdpa", "eager", "quantforge")),
        *(("pages", name) for name in ("sdpa", "quantforge")),
        *(("sliding", name) for name in ("sdpa", "eager")),
        ("sliding pages", "quantforge"),
    ],
)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_generate_gives_the_reference_tokens(
    layout: str, attention: str, mode: dict[str, Any], padded: bool
) -> None:
    family, sizes, settings = LAYOUTS[layout]
    model, ids = random_model(family, attention, **sizes), tokens(2)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :23] = 0
        ids = ids.where(mask.bool(), 0)
    ours, reference = pair(model, settings)
    got = generate(model, ids, ours, attention_mask=mask, **mode)
    assert torch.equal(got, generate(model, ids, reference, attention_mask=mask, **mode))
    assert_packed(ours)


def repetitive(length: int = PROMPT) -> torch.Tensor:
    """Return a text in which prompt lookup finds what to propose."""
    return tokens(1, 12).repeat(1, length // 12)


# transformers 5.17 copies a tensor in a way that torch warns of
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@each_layout
@pytest.mark.parametrize("helper", ["assistant", "lookup"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
def test_assisted_generation_takes_tokens_back(layout: Any, helper: str, sample: bool) -> None:
    """Several tokens a step, and crops of those that were refused: the cache forgets them."""
    family, sizes, settings = layout
    model = random_model(family, "quantforge" if sample else "sdpa", **sizes)
    arguments: dict[str, Any] = {"do_sample": sample}
    if helper == "lookup":
        arguments["prompt_lookup_num_tokens"] = 4
    else:  # the same model, disturbed a little: some of what it proposes is refused
        assistant = copy.deepcopy(model)
        with torch.no_grad():
            for weight in assistant.parameters():
                weight.mul_(1 + 0.05 * torch.randn_like(weight))
        arguments["assistant_model"] = assistant
    ours, reference = pair(model, settings)
    crops: list[int] = []
    crop = ours.crop
    ours.crop = lambda n: (crops.append(n), crop(n))[1]  # type: ignore[method-assign]
    got = generate(model, repetitive(), ours, **arguments)
    assert torch.equal(got, generate(model, repetitive(), reference, **arguments))
    assert any(crops), "nothing was refused: the test would not crop"
    assert_packed(ours)


@pytest.mark.skipif(
    crop_takes_lengths(), reason="before 5.20 transformers' own sliding layer does not fit its mask"
)
def test_an_assistant_may_have_a_quantized_cache_too() -> None:
    """Which generate() makes itself once the assistant is patched."""
    from quantforge.llm import patch_model

    model, assistant = random_model("llama"), random_model("qwen3_mixed")
    plain = generate(model, tokens(), QuantForgeCache(**CACHE), assistant_model=assistant)
    with patch_model(assistant, **CACHE):
        got = generate(model, tokens(), QuantForgeCache(**CACHE), assistant_model=assistant)
    assert torch.equal(got, plain), "greedy output does not depend on what is proposed"


@each_layout
@pytest.mark.parametrize("only_new", [False, True], ids=["all tokens", "new tokens"])
def test_a_chat_goes_on_with_its_cache(layout: Any, only_new: bool) -> None:
    family, sizes, settings = layout
    model, turns = random_model(family, **sizes), [tokens(2, n, seed=n) for n in (40, 9, 17)]
    outputs = []
    for cache in pair(model, settings):
        text = turns[0][:, :0]
        for turn in turns:
            text = torch.cat([text, turn], 1)
            seen = cache.get_seq_length() if only_new else 0
            mask = torch.ones_like(text)
            new = generate(model, text[:, seen:], cache, attention_mask=mask, max_new_tokens=8)
            text = torch.cat([text[:, :seen], new], 1)
        outputs.append(text)
    assert torch.equal(*outputs)


@each_layout
@pytest.mark.parametrize("attention", ["sdpa", "eager", "quantforge"])
def test_chunks_read_the_codes(layout: Any, attention: str) -> None:
    family, sizes, settings = layout
    model, ids = random_model(family, attention, **sizes), tokens(2, 130)
    logits = []
    for cache in pair(model, settings):
        with torch.no_grad():
            for start, stop in ((0, 50), (50, 51), (51, 96), (96, 130)):
                out = model(ids[:, start:stop], past_key_values=cache).logits
        logits.append(out.log_softmax(-1))
        assert cache.get_seq_length() == 130
    divergence = (logits[1].exp() * (logits[1] - logits[0])).sum(-1)
    assert divergence.max() < 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager", "quantforge"])
@pytest.mark.parametrize("layout", [LAYOUTS["rows"], LAYOUTS["pages"]], ids=["rows", "pages"])
def test_a_batch_without_padding_in_one_row(layout: Any, attention: str) -> None:
    """Texts of several lengths one after the other, told apart by a 4D mask."""
    family, sizes, settings = layout
    model, lengths = random_model(family, attention, **sizes), (20, 33, 27)
    owner = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(n) for n in lengths])
    ids = tokens(1, sum(lengths))
    outputs = []
    for cache in pair(model, settings):
        held, text, where, generated = owner, ids, position, []
        with torch.no_grad():
            for step in range(12):
                new = len(held) - cache.get_seq_length()
                index = torch.arange(len(held))
                seen = (held[-new:, None] == held) & (index <= index[-new:, None])
                mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
                logits = model(
                    text, attention_mask=mask[None, None], position_ids=where[None, -new:],
                    past_key_values=cache,
                ).logits[0]  # fmt: skip
                last = [int((held[-new:] == i).nonzero()[-1]) for i in range(3)]
                text = logits[last].argmax(-1)[None]
                generated.append(text)
                held = torch.cat([held, torch.arange(3)])
                where = torch.cat([where, torch.tensor(lengths) + step])
        outputs.append(torch.cat(generated))
    assert torch.equal(*outputs)
    alone = generate(
        model, ids[:, 20:53], FakeQuantCache(model.config, **CACHE), max_new_tokens=1
    )  # before anything but the window is packed, a text in the row is that text alone
    assert outputs[0][0, 1] == alone[0, -1]


@each_layout
def test_one_prefix_serves_several_continuations(layout: Any) -> None:
    family, sizes, settings = layout
    model, prefix = random_model(family, **sizes), tokens(1, 70)
    outputs = []
    for cache in pair(model, settings):
        with torch.no_grad():
            model(prefix, past_key_values=cache)
        outputs.append(
            [
                generate(model, torch.cat([prefix, tokens(1, 5, seed)], 1), copy.deepcopy(cache))
                for seed in (3, 4)
            ]
        )
        assert cache.get_seq_length() == 70
    for got, want in zip(*outputs, strict=True):
        assert torch.equal(got, want)


def test_windows_of_a_model_hold_constant_memory() -> None:
    model = random_model("mistral", sliding_window=48)
    cache = QuantForgeCache(model.config, **CACHE)
    sizes = []
    with torch.no_grad():
        for i in range(160):
            model(tokens(1, 1, seed=i), past_key_values=cache)
            sizes.append(cache.nbytes)
    assert all(isinstance(layer, QuantForgeSlidingLayer) for layer in cache.layers)
    assert len(set(sizes[100:])) == 1
    assert cache.get_seq_length() == 160
