"""The recipes of the optimizer run, and what they save is there."""

from __future__ import annotations

from pathlib import Path

from tests.recipes.test_recipes import run


def test_optimize_cache(tmp_path: Path) -> None:
    out = run("optimize_cache.py", "--small", "--output", str(tmp_path / "cache.json"))
    assert "allocated, 2 bits" in out
    assert (tmp_path / "cache.json").exists()


def test_optimize_vectors(tmp_path: Path) -> None:
    out = run("optimize_vectors.py", "--small", "--output", str(tmp_path / "vectors.json"))
    assert "settings measured (exhaustive)" in out
    assert (tmp_path / "vectors.json").exists()
