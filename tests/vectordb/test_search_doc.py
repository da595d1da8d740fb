"""docs/search.md is true: its code runs and does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOC = Path(__file__).parents[2] / "docs" / "search.md"


def test_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", DOC.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "search.md", "exec"), scope)
    assert scope["ids"].shape == scope["scores"].shape == (5, 10)
    assert scope["ids"][1:, 0].tolist() == [1, 2, 3, 4]
    assert set(scope["some"].flatten()) <= {1, 2, 3, 4}
    assert (scope["even"] % 2 == 0).all()
    assert [scope["limits"][0], scope["limits"][-1]] == [0, len(scope["near"])]
    assert (scope["near_scores"] >= 0.9).all()
    assert scope["restored"].shape == (2, 64)
    assert 1 <= scope["found"].nprobe <= 32
    assert len(scope["parts"][0]) == 4000
    assert len(scope["again"]) == 2001
    assert scope["report"]["total"] > 2001 * (64 * 4 // 8 + 4)
