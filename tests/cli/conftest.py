"""Vectors in files, and the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantforge.cli.main import main
from tests.helpers import gaussian

Run = Callable[..., str]


@pytest.fixture
def x() -> np.ndarray:
    return gaussian(600, 64)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x: np.ndarray) -> Path:
    """Go to a folder with `data.npy`, and its first five rows in `queries.npy`."""
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", x)
    np.save("queries.npy", x[:5])
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that has to succeed and return its stdout."""

    def call(*arguments: str) -> str:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    def call(*arguments: str) -> Any:
        return json.loads(run(*arguments, "--json"))

    return call


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that has to fail: exit code 1, one sentence on stderr, nothing on stdout."""

    def call(*arguments: str) -> str:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert code == 1
        assert not out
        assert err.startswith(f"quantforge {arguments[0]}: ")
        assert err.count("\n") == 1, err
        return err

    return call
