"""`quantforge eval`: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kv_fidelity import MODEL
from quantforge.cli.main import main

QUICK = ["--prompt", "400", "--decode", "4", "--samples", "1", "--no-needles", "--dtype", "float32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "text.py"
    path.write_text(Path(__file__).read_text() * 8)
    return path


def test_json_on_stdout_and_in_a_file(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "result.json"
    code = main(["eval", str(MODEL), "--text", str(text), *QUICK, "--preset", "small", "--bits",
                 "8", "4,2", "--json", "--output", str(saved)])  # fmt: skip
    out = json.loads(capsys.readouterr().out)
    assert code == 0
    assert json.loads(saved.read_text()) == out
    assert [row["cache"] for row in out["results"]] == [
        "the model's own", "small", "8 bits", "4,2 bits",
    ]  # fmt: skip
    own, *rows = out["results"]
    assert own["kl_mean"] == 0.0
    assert own["top1"] == 1.0
    assert all(0 < row["kl_mean"] < 1 and len(row["kl_by_position"]) == 4 for row in rows)
    assert rows[2]["settings"] == {"bits": [4, 2]}


def test_a_table_and_a_gate(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["eval", str(MODEL), "--text", str(text), *QUICK, "--bits", "1"]
    assert main([*call, "--max-kl", "1e-7", "--min-top1", "0"]) == 1
    out = capsys.readouterr().out
    assert "1 bits" in out
    assert "KL mean" in out
    assert main([*call, "--max-kl", "100"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny"], "preset must be one of quality, balanced, small"),
        (["--prompt", "100000"], "a passage needs 100004"),
        (["--text", "/no/such/file"], "No such file"),
    ],
)
def test_failures_say_why_on_stderr(
    text: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["eval", str(MODEL), "--text", str(text), *QUICK, *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["eval"], ["eval", "M", "--text", "t", "--bits", "4,3,2"], ["unknown"], []):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "usage: quantforge" in capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    call = [sys.executable, "-m", "quantforge.cli", "eval", "--help"]
    done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=120)
    assert "--max-kl" in done.stdout
