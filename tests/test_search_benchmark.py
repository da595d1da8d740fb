"""The search benchmark measures what it says, and its table and plot show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import search_tables, vector_search
from benchmarks.record import read_rows
from tests.helpers import threads
from tests.vectordb.data import skewed


def test_run_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tmp_path / "x.npy", tmp_path / "rows.jsonl"
    np.save(path, skewed(700, 64).numpy())
    only = "adapted [24] bits|centred 2|FAISS (Flat|SQ4)"
    with threads(1):
        vector_search.main([str(path), "--queries=100", f"--only={only}", f"--output={output}"])
    rows = {row["case"]: row for row in read_rows(output)}
    assert {"quantforge adapted 2 bits", "quantforge adapted 4 bits", "FAISS Flat"} <= set(rows)
    assert rows["FAISS Flat"]["recall"] == 1
    assert rows["FAISS Flat"]["code_bytes"] == 4 * 64
    two, four = rows["quantforge adapted 2 bits"], rows["quantforge adapted 4 bits"]
    assert 0.8 < two["recall"] < four["recall"]
    assert (two["code_bytes"], four["code_bytes"]) == (2 * 8 + 4, 4 * 8 + 4)
    assert all(row["n"] == 600 and row["qps"] > 0 and row["single_ms"] > 0 for row in rows.values())
    text = search_tables.table(output)
    assert all(name in text for name in rows)
    assert f"{two['recall']:.3f}" in text
    search_tables.main(output, tmp_path)
    assert "quantforge adapted" in capsys.readouterr().out
    assert (tmp_path / "vector_search.svg").stat().st_size > 5000
    assert "Not measured" in search_tables.table(tmp_path / "nothing")


def test_a_worse_index_has_less_recall() -> None:
    """The control: recall counts shared neighbours."""
    exact = np.array([[0, 1, 2, 3]])
    assert vector_search.recall(exact, exact) == 1
    assert vector_search.recall(np.array([[0, 9, 2, 8]]), exact) == 0.5
