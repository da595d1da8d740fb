"""The fidelity gate: tables, JSON, plots and needles of several caches."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.kv_fidelity import MODEL
from quantforge.errors import ConfigError, InputError
from quantforge.llm import Evaluation, evaluate
from quantforge.llm.evaluation import passages
from quantforge.llm.needles import SECRETS, needle_prompts

TEXT = Path(__file__).with_name("test_cache.py").read_text() * 3


@lru_cache(maxsize=1)
def shipped() -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), tokenizer


@lru_cache(maxsize=1)
def evaluation() -> Evaluation:
    caches = {"small": {"preset": "small", "window": 64}, "8 bits": {"bits": 8, "window": 64}}
    seen: list[str] = []
    result = evaluate(
        *shipped(), TEXT, caches, prompt=320, decode=4, samples=1, progress=seen.append
    )
    assert seen == ["the model's own", "the model's own", "small", "8 bits"]
    return result


def test_rows_tell_the_caches_apart() -> None:
    own, small, eight = evaluation().results
    assert own.fidelity.kl_mean == 0.0
    assert own.fidelity.bits_per_number == pytest.approx(32)  # float32
    assert 0 < eight.fidelity.kl_mean < small.fidelity.kl_mean
    assert eight.fidelity.bits_per_number < 20
    assert small.fidelity.bytes_per_token < eight.fidelity.bytes_per_token
    assert len(small.fidelity.kl) == 4
    assert small.fidelity.kl_mean == pytest.approx(sum(small.fidelity.kl) / 4)
    assert own.recalled == eight.recalled == 1.0
    assert list(own.needles) == [0.125, 0.375, 0.625, 0.875]


def test_table_and_json() -> None:
    text = str(evaluation())
    assert "4 tokens decoded one by one after 320, 1 passages" in text
    assert len({line.index("KL p99") for line in text.splitlines() if "KL p99" in line}) == 1
    assert text.count("100%") >= 2
    data = json.loads(json.dumps(evaluation().to_dict()))
    assert [row["cache"] for row in data["results"]] == ["the model's own", "small", "8 bits"]
    assert data["results"][2]["needles"]["0.125"] is True
    assert data["results"][1]["settings"] == {"preset": "small", "window": 64}


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    evaluation().plot(tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "<svg" in drawn


def test_passages_are_spread_over_the_text() -> None:
    _, tokenizer = shipped()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    rows = passages(tokenizer, TEXT, 3, 100)
    assert rows.shape == (3, 100)
    assert torch.equal(rows[0], ids[:100])
    assert torch.equal(rows[2], ids[-100:])
    with pytest.raises(InputError, match="longer text"):
        passages(tokenizer, "short", 1, 100)


def test_needles_stand_at_their_depths() -> None:
    _, tokenizer = shipped()
    needles = needle_prompts(tokenizer, TEXT, 600)
    assert [needle.code for needle in needles] == list(SECRETS.values())
    lines = tokenizer.decode(needles[0].input_ids[0]).splitlines()
    for needle in needles:
        (place,) = (i for i, line in enumerate(lines) if needle.code in line)
        assert place / len(lines) == pytest.approx(needle.depth, abs=0.08)
        assert 500 < needle.input_ids.shape[1] < 800
    with pytest.raises(InputError, match="longer text"):
        needle_prompts(tokenizer, "x = 1\n", 600)


def test_wrong_settings_are_found_before_anything_is_measured() -> None:
    with pytest.raises(ConfigError, match="unknown cache settings"):
        evaluate(*shipped(), TEXT, {"a": {"colour": 4}}, progress=lambda name: pytest.fail(name))
