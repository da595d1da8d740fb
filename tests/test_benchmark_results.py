"""Tables and plots say what the rows of a benchmark say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import op_tables, plots, record
from benchmarks.registry import cases


def sweep_rows() -> list[dict[str, Any]]:
    """Rows as a GPU at 80% of its read ceiling would write them."""
    where = {"device": "NVIDIA X", "torch": "2", "triton": "3", "threads": 1, "date": "2026-01-01"}
    rows = []
    for case in cases("decode_attention", "cuda"):
        time_us, dense_us = case.nbytes / 0.8 / 4e6, case.flops / 8 / 0.9 / 4e6
        rows.append(
            {
                "op": case.op, "case": case.name, "shape": case.shape, "time_us": time_us,
                "bytes": case.nbytes, "gbps": 3200.0, "read_gbps": 4000.0, "share": 0.8,
                "baselines": {"flash": {"time_us": dense_us}}, "best": "flash",
                "ratio": dense_us / time_us, "goal_ratio": case.goal_ratio, "goal_share": None,
                "environment": where,
            }
        )  # fmt: skip
    return rows


def test_plot_is_drawn_from_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for row in sweep_rows():
        record.put_row(tmp_path / "decode_attention_x.jsonl", row)
    first = plots.main(tmp_path, tmp_path)
    assert [path.name for path in first] == ["decode_attention_x.svg"]
    drawn = first[0].read_bytes()
    assert drawn.startswith(b"<?xml")
    assert plots.main(tmp_path, tmp_path)[0].read_bytes() == drawn


def test_tables_say_what_the_rows_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        op_tables, "result_files", lambda op, folder: sorted(tmp_path.glob(f"{op}_*"))
    )
    assert op_tables.op_table("decode_attention").startswith("Not measured yet")
    rows = sweep_rows()[:2]
    skipped = {"case": "large", "skipped": "needs 99 GiB", "environment": rows[0]["environment"]}
    for row in (*rows, skipped):
        record.put_row(tmp_path / "decode_attention_x.jsonl", row)
    lines = op_tables.op_table("decode_attention").splitlines()
    assert rows[0]["case"] in lines[2]
    assert "| 3,200 GB/s | 80% | flash, " in lines[2]
    assert lines[2].endswith(f"| {rows[0]['goal_ratio']}x |")
    assert "needs 99 GiB" in lines[4]
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[-1].startswith("NVIDIA X, torch 2, triton 3, 2026-01-01; read ceiling 4,000 GB/s")
