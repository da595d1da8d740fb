"""Every recipe runs with --small, in a process of its own as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def run(recipe: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / recipe), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_demo_cache(tmp_path: Path) -> None:
    out = run("demo_cache.py", "--small", "--output", str(tmp_path))
    assert "4 bits" in out
    assert (tmp_path / "demo.svg").exists() or "no plot" in out


def test_demo_search(tmp_path: Path) -> None:
    out = run("demo_search.py", "--small", "--output", str(tmp_path))
    assert "recall@10" in out
    assert (tmp_path / "docstrings-4bit.safetensors").exists()


@pytest.mark.parametrize("arguments", [(), ("--bits", "4,2", "--attention", "eager")])
def test_generate_with_cache(arguments: tuple[str, ...]) -> None:
    assert "tokens agree" in run("generate_with_cache.py", "--small", *arguments)


def test_prompt_cache(tmp_path: Path) -> None:
    out = run("prompt_cache.py", "--small", "--file", str(tmp_path / "prefix.safetensors"))
    assert "loaded in" in out
    assert (tmp_path / "prefix.safetensors").exists()


@pytest.mark.slow
def test_train_tiny_lm(tmp_path: Path) -> None:
    """The loss falls, and the asset is written and measured."""
    out = run("train_tiny_lm.py", "--small", "--out", str(tmp_path))
    assert "parameters" in out
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_stay_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 150
