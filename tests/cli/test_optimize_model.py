"""`quantforge optimize MODEL --text FILE`: bits by layer, printed and saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.kv_fidelity import MODEL
from quantforge import QuantForgeCache
from quantforge.cli.main import main
from tests.llm.models import random_model

QUICK = ["--passages", "4", "--prompt", "336", "--rest", "8", "--bits", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a small model of random weights, with the tokenizer of the one that ships."""
    folder = tmp_path_factory.mktemp("model")
    random_model("llama", vocab_size=1792).save_pretrained(folder)
    for path in MODEL.glob("tokenizer*"):
        shutil.copy(path, folder)
    return str(folder)


def test_bits_by_layer_are_found_and_saved(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, saved = tmp_path / "text.py", tmp_path / "settings.json"
    text.write_text(Path(__file__).read_text() * 12)
    call = ["optimize", model, "--text", str(text), *QUICK, "--save", str(saved), "--json"]
    assert main(call) == 0
    out = json.loads(capsys.readouterr().out)
    assert len(out["sensitivity"]) == 4
    assert out["budgets"][0]["uniform"]["name"] == "uniform, 2 bits"
    cache = QuantForgeCache.from_file(saved)
    assert cache.options.window == out["config"]["cache"]["window"]


def test_a_text_that_is_too_short(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.py"
    text.write_text("x = 1\n")
    assert main(["optimize", model, "--text", str(text), *QUICK]) == 1
    assert "a passage needs 344" in capsys.readouterr().err
