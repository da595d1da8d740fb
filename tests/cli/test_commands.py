"""`quantforge serve`, `optimize` and `demo`, and what all commands have in common."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantforge
import quantforge.server
from quantforge import QuantForgeConfig
from quantforge.cli import demo, info
from quantforge.cli.main import COMMANDS, main

Run = Callable[..., str]


# ---- serve ---------------------------------------------------------------------------------


def test_what_the_server_is_told(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(quantforge.server, "run", lambda **options: told.append(options))
    monkeypatch.delenv("QUANTFORGE_TOKEN", raising=False)
    run("serve", "--port", "8000")
    Path("token").write_text("from a file\n")
    run("serve", "--host", "0.0.0.0", "--port", "0", "--token-file", "token", "--folder", "shelf",
        "--workers", "3")  # fmt: skip
    monkeypatch.setenv("QUANTFORGE_TOKEN", "from outside")
    run("serve")
    common = {"host": "127.0.0.1", "port": 8000, "device": "cpu"}
    assert told == [
        {**common, "token": None},
        {"host": "0.0.0.0", "port": 0, "device": "cpu", "token": "from a file",
         "folder": Path("shelf"), "workers": 3},
        {**common, "token": "from outside"},
    ]  # fmt: skip


def test_serve_without_its_packages_or_token(
    folder: Path, fail: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("token").write_text("")
    assert "token is empty" in fail("serve", "--token-file", "token")
    monkeypatch.setattr(quantforge.server, "run", None)
    monkeypatch.delattr(quantforge.server, "run")
    for name in [name for name in sys.modules if name.startswith("quantforge.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'quantforge[server]'" in fail("serve")


def test_a_server_that_answers_and_stops(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [sys.executable, "-m", "quantforge.cli", "serve", "--port", str(port)]
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True) as server:
        try:
            for _ in range(600):
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                        assert answer.status == 200
                    break
                except OSError:
                    assert server.poll() is None, server.communicate()[1]
                    time.sleep(0.1)
            else:
                pytest.fail("no answer within a minute")
        finally:
            server.send_signal(signal.SIGTERM)
            _, err = server.communicate(timeout=60)
    assert server.returncode in (0, -signal.SIGTERM), err


# ---- optimize ------------------------------------------------------------------------------


def test_optimize(folder: Path, run: Run, run_json: Callable[..., Any]) -> None:
    data = run_json("optimize", "data.npy", "--policy", "random", "--trials", "3", "--accuracy",
                    "mse", "--save", "settings.json", "--plot", "front.svg")  # fmt: skip
    assert isinstance(data, dict)
    assert json.loads(Path("settings.json").read_text())["quantforge_settings"] == 1
    assert Path("front.svg").read_text().lstrip().startswith("<?xml")
    assert "bits" in run("optimize", "data.npy", "--policy", "random", "--trials", "2")


def test_what_the_optimizer_saves_compress_takes(folder: Path, run: Run) -> None:
    QuantForgeConfig(bits=5).save("settings.json")
    assert "5 bits" in run("compress", "data.npy", "--config", "settings.json", "-o", "x.npz")


# ---- demo ----------------------------------------------------------------------------------


def test_the_recipes_are_found_and_an_installation_without_them_says_so(
    tmp_path: Path, fail: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all((demo.recipes() / name).is_file() for name in demo.PARTS.values())
    package = tmp_path / "site" / "lib" / "quantforge"
    monkeypatch.setattr(quantforge, "__file__", str(package / "__init__.py"))
    assert "make demo" in fail("demo")
    inside = package / "recipes"
    inside.mkdir(parents=True)
    for name in demo.PARTS.values():
        (inside / name).write_text("")
    assert demo.recipes() == inside


def test_demo_runs_the_recipes(
    tmp_path: Path, run: Run, fail: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo_cache.py").write_text("import sys\nprint(__name__, *sys.argv)\n")
    (tmp_path / "demo_search.py").write_text("assert False, 'recall is low'\n")
    monkeypatch.setattr(demo, "recipes", lambda: tmp_path)
    before = list(sys.argv)
    out = run("demo", "--only", "cache", "--small", "--seed", "3", "--output", "there")
    script = tmp_path / "demo_cache.py"
    assert out == f"__main__ {script} --device cpu --seed 3 --output there --small\n"
    assert "recall is low" in fail("demo", "--only", "search")
    assert sys.argv == before


# ---- all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: quantforge {name}")
    assert "--verbose" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{quantforge.__version__}\n"


def test_an_interrupt_and_a_verbose_failure(
    folder: Path, fail: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert main(["info", "none.npy", "--verbose"]) == 1
    assert "where it was raised" in caplog.text

    def interrupted(args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert fail("info", "data.npy").endswith(": interrupted\n")


def test_commands_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    named = set(re.findall(r"^quantforge ([a-z]+)", text, re.MULTILINE))
    assert named == set(COMMANDS)


def test_documented_lines_run(folder: Path, run: Run) -> None:
    """The lines of docs/cli.md marked `bash`, one after the other, in one folder."""
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    os.rename("data.npy", "embeddings.npy")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
             for line in block.splitlines()]  # fmt: skip
    assert len(lines) >= 12
    for line in lines:
        program, *arguments = line.split()
        assert program == "quantforge"
        run(*arguments)
