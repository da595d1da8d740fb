"""A cache filled from a recorded prompt is the cache that the model would have filled."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from quantforge import QuantForgeCache
from quantforge.errors import ConfigError
from quantforge.llm.replay import RecordedPrompt
from tests.llm.models import SETTINGS, random_model

CASES = [
    ("llama", "sdpa"), ("llama", "eager"), ("llama", "quantforge"), ("qwen3_mixed", "sdpa"),
    ("gemma2", "eager"), ("deepseek_v3", "sdpa"), ("qwen3_next", "sdpa"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_replay_is_what_the_model_does(family: str, attention: str) -> None:
    model = random_model(family, attention)
    ids = torch.randint(2, 128, (2, 100), generator=torch.Generator().manual_seed(1))
    prompt, rest = ids[:, :80], ids[:, 80:]
    recorded = RecordedPrompt(model, prompt)
    for settings in (SETTINGS | {"bits": 2}, SETTINGS | {"layers": {1: {"bits": (3, 8)}}}):
        replayed, expected = (QuantForgeCache(model.config, **settings) for _ in range(2))
        recorded.fill(replayed)
        with torch.no_grad():
            model(prompt, past_key_values=expected, logits_to_keep=1)
            ours = model(rest, past_key_values=replayed).logits
            theirs = model(rest, past_key_values=expected).logits
        assert torch.equal(ours, theirs)
        assert replayed.nbytes == expected.nbytes


def test_own_cache_can_be_asked_for_again() -> None:
    model = random_model("llama")
    ids = torch.randint(2, 128, (1, 60), generator=torch.Generator().manual_seed(1))
    recorded, plain = RecordedPrompt(model, ids[:, :50]), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :50], past_key_values=plain, logits_to_keep=1)
        expected = model(ids[:, 50:], past_key_values=plain).logits
        for _ in range(2):
            assert torch.equal(model(ids[:, 50:], past_key_values=recorded.own()).logits, expected)
    assert recorded.dtype == torch.float32
    assert recorded.shapes[1] == ((1, 2, 50, 32), (1, 2, 50, 32))


def test_a_cache_that_does_not_know_its_layers() -> None:
    model = random_model("llama")
    recorded = RecordedPrompt(model, torch.ones(1, 20, dtype=torch.int64))
    with pytest.raises(ConfigError, match="does not know its layers"):
        recorded.fill(QuantForgeCache())
