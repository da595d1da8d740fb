"""Bits by layer: what is counted, what is measured, and when uniform bits stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantforge import QuantForgeCache
from quantforge.errors import ConfigError, InputError
from quantforge.llm.replay import RecordedPrompt
from quantforge.optimizer import Weights, optimize, recommend
from quantforge.optimizer.cache_result import Budget, CacheOptimization, MeasuredPlan
from quantforge.optimizer.probe import Probe
from quantforge.optimizer.slots import Plan, Slot, slots_of
from tests.llm.models import random_model

LENGTH, PROMPT = 16 + 128 + 64 + 8, 16 + 128 + 64


def tokens(passages: int = 6, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(2, 128, (passages, length), generator=torch.Generator().manual_seed(3))


def deaf_model() -> Any:
    """Return a model whose first layer attends to no avail: it may lose everything."""
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    return model


def search() -> CacheOptimization:
    return optimize(deaf_model(), tokens(), bits=(2, 3), choices=(1, 2, 4), prompt=PROMPT,
                    windows=(64, 128))  # fmt: skip


@pytest.fixture(scope="module")
def found() -> CacheOptimization:
    return search()


def test_bits_go_where_they_are_needed(found: CacheOptimization) -> None:
    assert (found.sensitivity[:2] == 0).all()
    assert (found.sensitivity[2:] > 0).all()
    for budget in found.budgets:
        assert [plan.plan.window for plan in budget.mixed] == [64, 128]
        for plan in budget.mixed:
            assert plan.plan.bits[0] == (1, 1)
            assert sum(plan.plan.bits[1]) >= 4
            assert plan.nbytes <= budget.uniform.nbytes
        same_window = budget.mixed[1]
        assert same_window.check.mean() < budget.uniform.check.mean() / 2
        assert budget.adopted
        assert budget.recommended is min(budget.mixed, key=lambda p: p.choice.mean())


def test_what_is_measured_is_what_the_cache_does(found: CacheOptimization) -> None:
    """Sensitivities and plans again, by plain forward passes."""
    model, ids = deaf_model(), tokens()
    plan = found.budgets[1].best
    for part, kl in ((ids[0::2], plan.choice), (ids[1::2], plan.check)):
        logits = []
        for cache in (None, QuantForgeCache(model.config, **plan.plan.settings)):
            with torch.no_grad():
                first = model(part[:, :PROMPT], past_key_values=cache, use_cache=True)
                rest = model(part[:, PROMPT:], past_key_values=first.past_key_values)
            logits.append(rest.logits.log_softmax(-1))
        own, ours = logits
        expected = (own.exp() * (own - ours)).sum(-1).double().mean(-1).numpy()
        np.testing.assert_allclose(kl, expected, rtol=1e-3, atol=1e-9)


def test_the_same_call_gives_the_same_result(found: CacheOptimization) -> None:
    again = search()
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())


def test_output(found: CacheOptimization, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = str(found)
    assert "uniform, 2 bits" in text
    assert "allocated, 3 bits" in text
    assert text.count("\n*") == 1
    found.plot(tmp_path / "kl.svg")
    assert (tmp_path / "kl.svg").read_bytes().startswith(b"<?xml")
    found.config.save(tmp_path / "settings.json")
    cache = QuantForgeCache.from_file(tmp_path / "settings.json", random_model("llama").config)
    best = found.best.recommended.plan
    assert cache.options.window == best.window
    for layer, pair in best.bits.items():
        assert cache.layers[layer].options.bits == pair
    assert "beats uniform bits" in found.recommendation.why
    assert "QuantForgeCache(model.config, bits=" in str(found.recommendation)


def plan_of(name: str, kl: list[float], nbytes: int = 100) -> MeasuredPlan:
    values = np.array(kl)
    return MeasuredPlan(name, Plan({0: (4, 4)}, 128), nbytes, values, values)


def test_an_allocation_must_beat_uniform_by_more_than_its_noise() -> None:
    uniform = plan_of("uniform", [0.10, 0.20, 0.30, 0.40])
    clear = plan_of("clear", [0.09, 0.19, 0.29, 0.38])  # little, but in every passage
    noisy = plan_of("noisy", [0.02, 0.25, 0.33, 0.38])  # more, but not in every passage
    worse = plan_of("worse", [0.11, 0.21, 0.31, 0.41])
    assert noisy.check.mean() < uniform.check.mean()
    chosen = [Budget(4, uniform, (p,), p).recommended.name for p in (clear, noisy, worse)]
    assert chosen == ["clear", "uniform", "uniform"]
    assert Budget(4, uniform, (), uniform).recommended is uniform


def test_only_uniform_bits_to_choose_from() -> None:
    result = optimize(random_model("llama"), tokens(4), bits=(3,), choices=(3,), windows=(128,),
                      prompt=PROMPT)  # fmt: skip
    assert result.best.recommended.name == "uniform, 3 bits"
    assert result.config.sections["cache"] == {"bits": [3, 3], "window": 128}
    assert "does not beat" in result.recommendation.why


def test_bytes_are_those_of_the_cache() -> None:
    """Codes and scales as allocated, but for the spare room of windows, which is alike."""
    model, ids = random_model("llama"), tokens(1, PROMPT)
    recorded, sizes, counted = RecordedPrompt(model, ids), [], []
    for bits in ((4, 4), (3, 2), (8, 1)):
        cache = QuantForgeCache(model.config, bits=bits)
        recorded.fill(cache)
        slots = slots_of(cache, recorded)
        plan = Plan(dict.fromkeys((0, 1), bits), 128)
        counted.append(plan.nbytes(slots, PROMPT, 4))
        sizes.append(cache.nbytes)
    assert np.diff(counted).tolist() == np.diff(sizes).tolist()
    own = recorded.own()
    nbytes = sum(t.nbytes for layer in own.layers for t in (layer.keys, layer.values))
    assert sum(slot.own_nbytes(PROMPT, 4) for slot in slots) == nbytes


def test_sliding_layers_hold_no_more_than_their_window() -> None:
    model = random_model("qwen3_mixed")
    recorded = RecordedPrompt(model, tokens(1, 100))
    slots = slots_of(QuantForgeCache(model.config), recorded)
    assert [(s.layer, s.part, s.longest) for s in slots] == [
        (0, "keys", 48), (0, "values", 48), (1, "keys", None), (1, "values", None)
    ]  # fmt: skip
    short = slots[0]
    assert short.nbytes(2, 10_000, 16, 16, 2) == 2 * (32 * (32 // 4 + 2) + 16 * 32 * 2)
    assert short.own_nbytes(10_000, 2) == 2 * 48 * 32 * 2
    assert Slot(0, "keys", 2, 32, None).nbytes(2, 20, 128, 16, 2) == 2 * 20 * 32 * 2


def test_layers_that_are_not_attention_have_no_slots() -> None:
    model = random_model("qwen3_next")
    result = optimize(model, tokens(4), bits=(2,), choices=(2, 3), windows=(64,), prompt=PROMPT)
    assert {slot.layer for slot in result.slots} == {1}


def test_settings_name_the_layers_that_differ() -> None:
    plan = Plan({0: (4, 3), 1: (2, 2), 2: (2, 2)}, 64)
    assert plan.settings == {"bits": [2, 2], "window": 64, "layers": {0: {"bits": [4, 3]}}}
    cache = QuantForgeCache(random_model("llama", num_hidden_layers=3).config, **plan.settings)
    assert [layer.options.bits for layer in cache.layers] == [(4, 3), (2, 2), (2, 2)]
    assert str(plan) == "4,3 2,2 2,2"


def test_latency_is_measured_where_it_counts() -> None:
    weights = Weights(1, 1, 1)
    result = optimize(random_model("llama"), tokens(4), objective=weights, bits=(2, 4),
                      choices=(2, 4), windows=(128,), prompt=PROMPT)  # fmt: skip
    assert result.latencies is not None
    assert {"own", "uniform, 2 bits", "uniform, 4 bits"} <= set(result.latencies)
    assert all(latency.median_ms > 0 for latency in result.latencies.values())
    assert (result.no_latency is None) or "latency is left out" in str(result)


def test_limits(found: CacheOptimization) -> None:
    few, many = (budget.recommended.nbytes for budget in found.budgets)
    assert few < many
    exact = min(found.budgets, key=lambda b: b.recommended.choice.mean())
    assert replace(found, weights=Weights(1, 0)).best is exact
    assert replace(found, weights=Weights(0, 1)).best.bits == 2
    kl = float(exact.recommended.choice.mean())
    assert replace(found, weights=Weights(0, 1), max_kl=kl).best is exact
    assert replace(found, weights=Weights(1, 0), max_bytes=few).best.bits == 2
    with pytest.raises(ConfigError, match=r"no plan has at most 10 bytes .* the fewest bytes are"):
        _ = replace(found, max_bytes=10).best


def test_recommend_is_the_advice_of_optimize() -> None:
    advice = recommend(random_model("llama"), tokens(4), bits=(2,), choices=(2, 8), windows=(64,),
                       prompt=PROMPT, number_bytes=2)  # fmt: skip
    assert "QuantForgeCache(model.config, bits=" in advice.what
    own = 2 * 2 * 2 * 32 * LENGTH * 2  # layers, parts, heads, dim, tokens, bytes
    assert f"instead of {own:,}" in advice.nbytes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": None}, InputError, "a model needs tokens"),
        ({"tokens": tokens(3)}, InputError, "at least 4 passages"),
        ({"tokens": tokens().float()}, InputError, "tokens must be integers"),
        ({"prompt": LENGTH}, InputError, "prompt must lie between 0 and"),
        ({"prompt": PROMPT - 1}, InputError, "leaves nothing to pack beside a window of 128"),
        ({"windows": (256,)}, InputError, "at least 336 tokens"),
        ({"bits": ()}, ConfigError, "bits must name at least one"),
        ({"choices": (9,)}, ConfigError, "choices must be an integer from 1 to 8; got 9"),
        ({"windows": (-1,)}, ConfigError, "windows must be an integer"),
        ({"context": 0}, ConfigError, "context must be an integer from 1"),
        ({"objective": "best"}, ConfigError, "objective must be one of balanced"),
    ],
)
def test_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimize(
            random_model("llama"),
            **{"tokens": tokens(), "prompt": PROMPT, "windows": (64,), **arguments},
        )


def test_probe_joins_its_batches() -> None:
    model, ids = random_model("llama"), tokens(5)
    whole, parts = (Probe(model, ids, PROMPT, batch) for batch in (5, 2))
    a, b = (probe.divergence({"bits": 2}) for probe in (whole, parts))
    np.testing.assert_allclose(a, b, rtol=1e-3)
    assert len(a) == 5
    assert (a > 0).all()
