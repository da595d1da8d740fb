"""`quantforge completion`: what bash offers, and what the other scripts name."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from quantforge.cli.index import ACTIONS
from quantforge.cli.main import COMMANDS

Run = Callable[..., str]


@pytest.fixture
def offered(folder: Path, run: Run) -> Callable[..., list[str]]:
    """Ask bash what it offers for the last of these words."""
    Path("done.bash").write_text(run("completion", "bash"))

    def ask(*words: str) -> list[str]:
        line = "quantforge " + " ".join(f"'{word}'" for word in words)
        program = (
            f"source done.bash; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _quantforge; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", program], capture_output=True, text=True, check=True,
            env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
        assert not done.stderr
        return done.stdout.split()

    return ask


def test_bash(offered: Callable[..., list[str]]) -> None:
    assert offered("") == [*COMMANDS, "--help", "--version"]
    assert offered("co") == ["compress", "completion"]
    assert offered("index", "") == [*ACTIONS, "--help", "--verbose"]
    assert offered("index", "build", "a.npy", "--me") == ["--metadata", "--metric"]
    assert offered("index", "build", "--metric", "") == ["ip", "cosine", "l2"]
    assert offered("compress", "") == []  # files, by bash itself
    assert offered("compress", "--scale-r") == ["--scale-rule"]
    assert offered("compress", "--scale-rule", "n") == ["norm"]
    assert offered("search", "index", "--") == offered("search", "--")  # a folder named index


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_name_everything(run: Run, shell: str) -> None:
    script = run("completion", shell)
    for name in (*COMMANDS, *ACTIONS, "scale-rule", "train-rows", "unbiased"):
        assert name in script
    assert script.startswith(
        {"zsh": "#compdef quantforge", "fish": "complete -c quantforge"}[shell]
    )
