"""`quantforge optimize MODEL --text FILE`: bits by layer, printed and saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kv_fidelity import MODEL
from quantforge import QuantForgeCache
from quantforge.cli.main import main

QUICK = ["--passages", "4", "--prompt", "336", "--rest", "8", "--bits", "2"]


def test_bits_by_layer_are_found_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, saved = tmp_path / "text.py", tmp_path / "settings.json"
    text.write_text(Path(__file__).read_text() * 12)
    call = ["optimize", str(MODEL), "--text", str(text), *QUICK, "--save", str(saved)]
    assert main([*call, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert len(out["sensitivity"]) == 10
    assert out["budgets"][0]["uniform"]["name"] == "uniform, 2 bits"
    cache = QuantForgeCache.from_file(saved)
    assert cache.options.window == out["config"]["cache"]["window"]
    assert main([*call, "--force", "--max-kl", "1e-9"]) == 1
    assert "no plan has" in capsys.readouterr().err


def test_a_text_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.py"
    text.write_text("x = 1\n")
    assert main(["optimize", str(MODEL), "--text", str(text), *QUICK]) == 1
    assert "a passage needs 344" in capsys.readouterr().err
