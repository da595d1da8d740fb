"""The benchmark of the native operators runs, checks its results and writes its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import native_ops, record
from quantforge.native.library import Library
from tests.helpers import threads


def test_benchmark(library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "300", "--keys", "256", "--levels", "portable"]
    with threads(1):
        native_ops.main([*arguments, "--output", str(tmp_path)])
    rows = record.load("native_ops", tmp_path)["rows"]
    assert {row["op"] for row in rows} == {"scores", "attention", "quantize", "dequantize"}
    assert {row["level"] for row in rows} == {"portable"}
    targets = [row["target"] for row in rows if row["target"] is not None]
    assert targets == [8, 20, 1.5, 4, 2, 2]
    assert all(row["ratio"] > 0 for row in rows)
    cold = [row for row in rows if row["cold_ms"] is not None]
    assert [row["target"] for row in cold] == targets
    assert all(row["cold_ratio"] > 0 for row in cold)
    shown = capsys.readouterr().out
    assert shown.count("target") == len(targets)
