"""Kinds of models: sliding windows, sinks, soft-caps, hybrids, latents, encoders, images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache, EncoderDecoderCache
from transformers.integrations.flash_attention import flash_attention_forward

from quantforge import QuantForgeCache
from quantforge.errors import ConfigError, UnsupportedError
from quantforge.llm.fidelity import decode_logits
from quantforge.llm.latent import LatentLayer
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig
from quantforge.llm.segments import SegmentedTensor
from quantforge.llm.sliding import QuantForgeSlidingLayer
from tests.llm.models import HYBRIDS, SETTINGS, config_of, random_model
from tests.llm.reference import FakeQuantCache

CACHE: dict[str, Any] = SETTINGS | {"equalizer": False}
PROMPT, LENGTH = 60, 84


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 128, (batch, length), generator=generator)


def assert_same(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Compare log-probabilities; one code that rounding moved is allowed."""
    divergence = (reference.exp() * (reference - ours)).sum(-1)
    assert divergence.max() < 1e-3
    assert divergence.median() < 1e-6


WINDOWS = [
    ("mistral", {"sliding_window": 48}, "sdpa"),
    ("mistral", {"sliding_window": 48}, "quantforge"),
    ("mistral", {"sliding_window": 48, "head_dim": 64}, "quantforge"),  # pages
    ("mistral", {"sliding_window": 12}, "sdpa"),  # shorter than what stays dense
    ("gemma2", {}, "eager"),
    ("gemma2", {}, "quantforge"),
    ("gemma2", {"head_dim": 64}, "quantforge"),
    ("gemma3_text", {}, "sdpa"),
    ("gemma3_text", {}, "quantforge"),
    ("gpt_oss", {}, "eager"),
    ("gpt_oss", {}, "quantforge"),
    ("gpt_oss", {"head_dim": 64}, "quantforge"),
    ("llama4_text", {}, "sdpa"),
]


@pytest.mark.parametrize(("family", "changes", "attention"), WINDOWS)
def test_sliding_windows(family: str, changes: dict[str, Any], attention: str) -> None:
    model = random_model(family, attention, **changes)
    settings = CACHE | ({"layout": "pages"} if changes.get("head_dim") == 64 else {})
    ours = QuantForgeCache(model.config, **settings)
    assert any(isinstance(layer, QuantForgeSlidingLayer) for layer in ours.layers)
    assert_same(
        decode_logits(model, tokens(), PROMPT, ours),
        decode_logits(model, tokens(), PROMPT, FakeQuantCache(model.config, **settings)),
    )
    for layer in ours.layers:
        is_short = layer.is_sliding and layer.sliding_window < 24
        assert isinstance(layer.keys, SegmentedTensor) != is_short


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama"])
def test_our_attention_reads_a_static_cache(family: str) -> None:
    """Caps and sinks, of layers of full attention in pages and of short windows kept dense."""
    model = random_model(family, "quantforge", head_dim=64)
    settings = CACHE | {"layout": "pages", "page_size": 64}
    ours = QuantForgeCache(model.config, max_cache_len=160, **settings)
    assert_same(
        decode_logits(model, tokens(2, 130), 100, ours),
        decode_logits(model, tokens(2, 130), 100, FakeQuantCache(model.config, **settings)),
    )


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gemma3_text", "llama"])
def test_our_attention_is_eager_attention(family: str) -> None:
    """Without a quantized cache too, and in all three kinds of calls."""
    models = [random_model(family, name) for name in ("eager", "quantforge")]
    mask = torch.ones(2, LENGTH)
    mask[0, :9] = 0
    logits = []
    for model in models:
        cache, parts = DynamicCache(config=model.config), []
        with torch.no_grad():
            parts.append(model(tokens(), attention_mask=mask).logits[:, 9:])
            for start, stop in ((0, 50), (50, 51), (51, 70), (70, 71)):
                new = tokens()[:, start:stop]
                seen = mask[:, :stop]
                out = model(new, attention_mask=seen, past_key_values=cache).logits
                parts.append(out if start else out[:, 9:])
        logits.append(torch.cat(parts, 1).log_softmax(-1))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_our_attention_trains_as_eager_does(family: str) -> None:
    gradients = []
    for name in ("eager", "quantforge"):
        model = random_model(family, name, num_hidden_layers=2)
        model(tokens(1, 20), labels=tokens(1, 20)).loss.backward()
        attention = model.model.layers[0].self_attn
        weights = [x.weight for x in (attention.q_proj, attention.k_proj, attention.v_proj)]
        gradients.append([w.grad for w in (*weights, getattr(attention, "sinks", weights[0]))])
    for eager, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_our_attention_on_cuda(family: str, dtype: torch.dtype) -> None:
    """Windows in pages, sinks and caps in the fused operator, a prompt through flash."""
    changes = {"head_dim": 128} | ({"sliding_window": 96} if family == "mistral" else {})
    ids, logits = tokens(2, 330).cuda(), []
    for attention, make in (("quantforge", QuantForgeCache), ("eager", FakeQuantCache)):
        model = random_model(family, attention, **changes).to("cuda", dtype)
        cache = make(model.config, **CACHE)
        logits.append(decode_logits(model, ids, 290, cache))
        if make is QuantForgeCache:
            kinds = {type(layer.keys.source).__name__ for layer in cache.layers}
            assert kinds == {"PagedRows"}
    divergence = (logits[1].exp() * (logits[1] - logits[0])).sum(-1)
    assert divergence.median() < {torch.float16: 2e-3, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("attention", ["sdpa", "quantforge"])
def test_hybrids_quantize_what_is_attention(family: str, attention: str) -> None:
    model = random_model(family, attention)
    ours, theirs = QuantForgeCache(model.config, **CACHE), DynamicCache(config=model.config)
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        own = isinstance(layer, QuantForgeLayer)
        assert own or type(layer) is type(other)
        assert own or type(other).__name__.startswith("LinearAttention")
    assert_same(
        decode_logits(model, tokens(), PROMPT, ours),
        decode_logits(model, tokens(), PROMPT, FakeQuantCache(model.config, **CACHE)),
    )


def test_a_hybrid_needs_its_config() -> None:
    model = random_model("qwen3_next")
    with pytest.raises(ConfigError, match=r"QuantForgeCache\(config=model.config\)"):
        model(tokens(), past_key_values=QuantForgeCache())


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_latents_are_kept_packed_and_decoded_for_the_model(family: str) -> None:
    model = random_model(family)
    ours = QuantForgeCache(model.config, **CACHE)
    assert all(isinstance(layer, LatentLayer) for layer in ours.layers)
    assert_same(
        decode_logits(model, tokens(), PROMPT, ours),
        decode_logits(model, tokens(), PROMPT, FakeQuantCache(model.config, **CACHE)),
    )
    assert isinstance(ours.layers[0].keys, SegmentedTensor)
    with pytest.raises(UnsupportedError, match="MLA"):
        decode_logits(model, tokens(), PROMPT, QuantForgeCache(**CACHE))


@pytest.mark.parametrize("layout", ["rows", "pages"])
def test_keys_and_values_of_different_dims(layout: Any) -> None:
    layer = QuantForgeLayer(CacheConfig(layout=layout, **SETTINGS))
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 2, 90, 128, generator=generator)
    value = torch.randn(2, 2, 90, 64, generator=generator)
    layer.update(key[:, :, :80], value[:, :, :80])
    keys, values = layer.update(key[:, :, 80:81], value[:, :, 80:81])
    query = torch.randn(2, 8, 1, 128, generator=generator)
    got = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    want = F.scaled_dot_product_attention(
        query, keys.dequantize(), values.dequantize(), enable_gqa=True
    )
    assert got.shape == (2, 8, 1, 64)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


# ---- encoders and images ---------------------------------------------------------------------

SMALL = {"vocab_size": 128, "d_model": 64, "decoder_start_token_id": 1, "pad_token_id": 0}
LAYERS = {
    "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "init_std": 0.2,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
ENCODERS: dict[str, tuple[str, Any]] = {
    "t5": (
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(
            **SMALL, d_kv=16, d_ff=128, num_layers=1, num_decoder_layers=2, num_heads=4,
            initializer_factor=4.0, eos_token_id=None,
        ),
    ),
    "bart": (
        "BartForConditionalGeneration",
        lambda: transformers.BartConfig(**SMALL, **LAYERS, forced_eos_token_id=None),
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        lambda: transformers.WhisperConfig(
            **SMALL, **LAYERS, num_mel_bins=8, max_source_positions=90, max_target_positions=128,
            suppress_tokens=None, begin_suppress_tokens=None,
        ),
    ),
}  # fmt: skip


def _encoder_model(name: str, attention: str) -> Any:
    kind, config = ENCODERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)._from_config(config(), attn_implementation=attention)
    return model.eval()


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "quantforge"])
def test_cross_attention(name: str, attention: str) -> None:
    """What the encoder says is packed too: it is long, and attended to in every step."""
    model = _encoder_model(name, attention)
    inputs: dict[str, Any] = {"input_ids": tokens(2, 90)}
    if name == "whisper":
        features = torch.randn(2, 8, 180, generator=torch.Generator().manual_seed(3))
        inputs = {"input_features": features}
    logits, caches = [], []
    text = tokens(2, 60, seed=2)
    for make in (QuantForgeCache, FakeQuantCache):
        cache = EncoderDecoderCache(make(**CACHE), make(**CACHE))
        steps: list[torch.Tensor] = []
        with torch.no_grad():
            encoded = model.get_encoder()(**inputs)
            for start, stop in ((0, 40), *((i, i + 1) for i in range(40, 60))):
                out = model(
                    encoder_outputs=encoded, decoder_input_ids=text[:, start:stop],
                    past_key_values=cache,
                )  # fmt: skip
                steps.append(out.logits)
        logits.append(torch.cat(steps, 1).log_softmax(-1))
        caches.append(cache)
    assert_same(*logits)
    for part in (caches[0].self_attention_cache, caches[0].cross_attention_cache):
        assert all(isinstance(layer.keys, SegmentedTensor) for layer in part.layers)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_beams_of_an_encoder_model(name: str) -> None:
    model = _encoder_model(name, "sdpa")
    outputs = [
        model.generate(
            tokens(2, 90), past_key_values=EncoderDecoderCache(make(**CACHE), make(**CACHE)),
            num_beams=3, max_new_tokens=50, min_new_tokens=50, do_sample=False,
        )
        for make in (QuantForgeCache, FakeQuantCache)
    ]  # fmt: skip
    assert torch.equal(*outputs)


VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 7, "vision_use_head": False,
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager", "quantforge"])
def test_tokens_of_an_image_see_each_other(attention: str) -> None:
    """Two images, the second after the first was packed: its mask is not causal."""
    text = config_of("gemma3_text").to_dict() | {"vocab_size": 130}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=transformers.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=16, image_token_index=129, boi_token_index=127, eoi_token_index=126,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation=attention
    ).eval()
    image = torch.full((1, 16), 129)
    ids = torch.cat([tokens(1, 9), image, tokens(1, 50, 2), image, tokens(1, 12, 3)], 1)
    pictures = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    logits = []
    for cache in (QuantForgeCache(config, **CACHE), FakeQuantCache(config, **CACHE)):
        steps = []
        with torch.no_grad():
            # up to the second image at once, then it and what follows, then token by token
            for start, stop, shown in (
                (0, 72, 0),
                (72, 94, 1),
                *((i, i + 1, 2) for i in range(94, 103)),
            ):
                new = ids[:, start:stop]
                out = model(
                    new, past_key_values=cache, token_type_ids=(new == 129).long(),
                    attention_mask=torch.ones(1, stop, dtype=torch.long),
                    pixel_values=pictures[shown : shown + 1] if shown < 2 else None,
                )  # fmt: skip
                steps.append(out.logits)
        logits.append(torch.cat(steps, 1).log_softmax(-1))
    assert_same(*logits)


# ---- attention functions that cannot read codes ------------------------------------------------


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_that_needs_dense_keys_names_those_that_do_not(name: str) -> None:
    """At the first update, before a long prompt has been run for nothing."""
    model = random_model("llama")
    cache = QuantForgeCache(model.config, **CACHE)
    model.config._attn_implementation_internal = name
    keys = torch.randn(1, 2, 30, 32)
    with pytest.raises(UnsupportedError, match=r'set_attn_implementation\("quantforge"\)'):
        cache.update(keys, keys, 0)
    model.set_attn_implementation("quantforge")
    cache.update(keys, keys, 0)


def test_attention_that_needs_dense_keys_is_told_by_who_calls() -> None:
    """Also without a config, before its compiler sees tensors that it cannot trace."""
    model = random_model("llama", "flex_attention")
    with pytest.raises(UnsupportedError, match=r'"flex_attention".*attn_implementation'):
        model(torch.ones(1, 30, dtype=torch.long), past_key_values=QuantForgeCache(**CACHE))


def test_flash_attention_without_config_is_refused_with_a_remedy() -> None:
    layer = QuantForgeLayer(CacheConfig(**CACHE))
    states = torch.randn(1, 2, 60, 32)
    layer.update(states, states)
    keys, values = layer.update(states[:, :, :1], states[:, :, :1])
    with pytest.raises(UnsupportedError, match='attn_implementation="quantforge"'):
        flash_attention_forward(torch.nn.Module(), states[:, :, :1], keys, values, None)
