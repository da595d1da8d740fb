"""docs/optimizer.md is true: its code runs and does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOC = Path(__file__).parents[2] / "docs" / "optimizer.md"


def test_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", DOC.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    scope: dict = {}
    exec(compile(blocks[0], "optimizer.md", "exec"), scope)
    point = scope["result"].choices["vectors"].recommended
    assert point.accuracy("recall", "choice").mean() >= 0.8
    assert scope["config"] == point.config
    assert "gives up" in capsys.readouterr().out
