"""`quantforge index` and `search`: folders, files, ids, streams."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from quantforge.cli import search as search_module
from quantforge.cli import shelf
from quantforge.cli.main import main
from quantforge.vectordb import IndexStore, QuantizedIndex

Run = Callable[..., str]
BOTH = pytest.mark.parametrize("name", ["shelf", "shelf.safetensors"])


def lines(out: str) -> list[list[str]]:
    return [line.split("\t") for line in out.splitlines()]


@BOTH
def test_build_search_add_remove(
    folder: Path, run: Run, run_json: Callable[..., Any], x: np.ndarray, name: str
) -> None:
    built = run_json("index", "build", "data.npy", name, "--bits", "4")
    assert (built["added"], built["vectors"], built["dim"]) == (600, 600, 64)
    found = lines(run("search", name, "queries.npy", "-k", "3"))
    assert len(found) == 15
    assert [row[:3] for row in found[::3]] == [[str(i), "1", str(i)] for i in range(5)]
    np.save("more.npy", 2 * x[:2])
    assert run_json("index", "add", name, "more.npy")["vectors"] == 602
    nearest = [json.loads(row) for row in run("search", name, "queries.npy", "--json").splitlines()]
    assert [row["query"] for row in nearest] == list(range(5))
    assert [row["ids"][0] for row in nearest] == [600, 601, 2, 3, 4]
    assert all(len(row["ids"]) == 10 == len(row["scores"]) for row in nearest)
    assert run_json("index", "remove", name, "600", "2")["removed"] == 2
    nearest = [row[2] for row in lines(run("search", name, "queries.npy", "-k", "1"))]
    assert nearest[:2] == ["0", "601"]
    assert nearest[2] != "2"
    stats = run_json("index", "stats", name)
    assert stats["vectors"] == 600
    assert stats["config.bits"] == 4
    assert run_json("info", name) == stats
    assert "vectors: 600" in run("index", "stats", name)


def test_the_index_is_the_one_that_python_makes(folder: Path, run: Run, x: np.ndarray) -> None:
    run("index", "build", "data.npy", "a.safetensors", "--mode", "centred", "--metric", "l2",
        "--seed", "3", "--originals", "float16", "--nlist", "0")  # fmt: skip
    run("search", "a.safetensors", "queries.npy", "-k", "4", "--rerank", "50", "-o", "found.npz")
    index = QuantizedIndex.load("a.safetensors")
    assert (index.config.mode, index.config.metric, index.config.seed) == ("centred", "l2", 3)
    ids, scores = index.search(x[:5], 4, rerank=50)
    found = np.load("found.npz")
    np.testing.assert_array_equal(found["ids"], ids)
    np.testing.assert_array_equal(found["scores"], scores)


@BOTH
def test_ids_from_files(folder: Path, run: Run, name: str) -> None:
    Path("ids.txt").write_text("".join(f"{1000 + i}\n" for i in range(600)))
    run("index", "build", "data.npy", name, "--ids", "ids.txt")
    assert lines(run("search", name, "queries.npy", "-k", "1"))[3][2] == "1003"
    np.save("ids.npy", np.arange(5))
    run("index", "add", name, "queries.npy", "--ids", "ids.npy")
    run("index", "remove", name, "--ids-from", "ids.npy")
    assert lines(run("search", name, "queries.npy", "-k", "1"))[3][2] == "1003"


@BOTH
def test_a_failure_changes_nothing(
    folder: Path, run: Run, fail: Run, monkeypatch: pytest.MonkeyPatch, x: np.ndarray, name: str
) -> None:
    monkeypatch.setattr(shelf, "STEP_NUMBERS", 100 * 64)
    run("index", "build", "data.npy", name)
    before = sorted(folder.rglob("*"))
    x[450] = np.nan
    np.save("bad.npy", x)
    assert "finite" in fail("index", "add", name, "bad.npy")
    assert "finite" in fail("index", "build", "bad.npy", name, "--force", "--mode", "oblivious")
    assert "finite" in fail("index", "build", "bad.npy", "new", "--mode", "oblivious")
    assert "is there already" in fail("index", "build", "data.npy", name)
    assert "7000 is not" in fail("index", "remove", name, "1", "7000")
    os.remove("bad.npy")
    assert sorted(folder.rglob("*")) == before
    assert len(shelf.reading(name)) == 600
    assert lines(run("search", name, "queries.npy", "-k", "1"))[1][2] == "1"


@BOTH
def test_force_replaces(folder: Path, run: Run, name: str) -> None:
    run("index", "build", "data.npy", name)
    run("index", "build", "queries.npy", name, "--force", "--mode", "oblivious")
    assert len(shelf.reading(name)) == 5
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_force_does_not_replace_what_is_no_index(folder: Path, fail: Run) -> None:
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    for name in ("mine", "data.npy"):
        assert "is no index" in fail("index", "build", "data.npy", name, "--force")
    assert Path("mine/letter.txt").read_text() == "dear"
    assert Path("data.npy").is_file()


def test_vectors_and_queries_come_in_parts(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, x: np.ndarray
) -> None:
    run("index", "build", "data.npy", "whole")
    expected = run("search", "whole", "data.npy", "-k", "2")
    sizes: list[int] = []
    add = IndexStore.add

    def counted(self: IndexStore, vectors: Any, ids: Any = None, **parts: Any) -> np.ndarray:
        sizes.append(len(vectors))
        return add(self, vectors, ids, **parts)

    monkeypatch.setattr(IndexStore, "add", counted)
    monkeypatch.setattr(shelf, "STEP_NUMBERS", 64 * 64)
    monkeypatch.setattr(search_module, "QUERIES_AT_A_TIME", 7)
    run("index", "build", "data.npy", "parts")
    assert sizes == [64] * 9 + [24]
    found = run("search", "parts", "data.npy", "-k", "2")
    assert [row[:3] for row in lines(found)] == [row[:3] for row in lines(expected)]


def test_stdin(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO(Path("data.npy").read_bytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=buffer))
    run("index", "build", "-", "shelf", "--train-rows", "100")
    assert [row[2] for row in lines(run("search", "shelf", "queries.npy", "-k", "1"))] == [
        "0", "1", "2", "3", "4",
    ]  # fmt: skip


@BOTH
def test_calibrate(
    folder: Path, run: Run, run_json: Callable[..., Any], fail: Run, name: str
) -> None:
    run("index", "build", "data.npy", name, "--nlist", "8")
    data = run_json("index", "calibrate", name, "--recall", "0.8", "-k", "3")
    assert 1 <= data["nprobe"] <= data["nlist"] == 8
    assert data["recall"] >= 0.8
    assert shelf.reading(name).nprobe == data["nprobe"]
    run("search", name, "queries.npy", "--nprobe", "2")
    run("search", name, "queries.npy", "--recall", "0.5")
    run("index", "build", "data.npy", name, "--force", "--nlist", "0")
    assert "no lists" in fail("index", "calibrate", name)


@pytest.mark.parametrize("name", ["c.npz", "c.safetensors"])
def test_search_in_compressed_vectors(
    folder: Path, run: Run, fail: Run, x: np.ndarray, name: str
) -> None:
    run("compress", "data.npy", "-o", name, "--shift")
    found = lines(run("search", name, "queries.npy", "-k", "2"))
    assert [row[2] for row in found[::2]] == ["0", "1", "2", "3", "4"]
    assert float(found[0][3]) == pytest.approx(float(x[0] @ x[0]), rel=0.05)
    assert "--rerank is for one" in fail("search", name, "queries.npy", "--rerank", "20")
    assert "k=601" in fail("search", name, "queries.npy", "-k", "601")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["search", "nothing", "queries.npy"], "nothing"),
        (["search", "data.npy", "queries.npy"], "not a readable safetensors"),
        (["search", "shelf", "wrong.npy"], "64"),
        (["search", "shelf", "queries.npy", "-k", "700"], "from 1 to 600"),
        (["search", ".", "queries.npy"], "the folder . is no index"),
        (["index", "add", "nothing", "data.npy"], "there is no index at nothing"),
        (["index", "stats", "data.npy"], "there is no index at data.npy"),
        (["index", "remove", "shelf"], "either as IDs or by --ids-from"),
        (["index", "add", "shelf", "queries.npy", "--ids", "empty.txt"], "line 2 is empty"),
        (["index", "add", "shelf", "queries.npy", "--ids", "short.txt"], "1 ids for 5 vectors"),
        (["index", "add", "shelf", "queries.npy", "--ids", "taken.npy"], "id 0 is in the index"),
    ],
)
def test_failures(folder: Path, run: Run, fail: Run, line: list[str], message: str) -> None:
    run("index", "build", "data.npy", "shelf")
    np.save("wrong.npy", np.ones((2, 32), np.float32))
    np.save("taken.npy", np.arange(5))
    Path("empty.txt").write_text("1\n\n3\n")
    Path("short.txt").write_text("9\n")
    assert message in fail(*line)


@pytest.mark.parametrize(
    "line",
    [
        ["index"],
        ["index", "build", "data.npy"],
        ["index", "build", "data.npy", "x", "--metric", "l3"],
        ["search", "shelf", "queries.npy", "-k", "0"],
        ["search", "shelf", "queries.npy", "--recall", "1.5"],
        ["search", "shelf", "queries.npy", "--where", "{"],
        ["search", "shelf", "queries.npy", "-o", "x.npy"],
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], line: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    assert "usage: quantforge" in capsys.readouterr().err


def test_a_reader_that_leaves_early(folder: Path, run: Run) -> None:
    """`quantforge search ... | head -1` ends without a word."""
    run("compress", "data.npy", "-o", "c.npz")
    call = f"{sys.executable} -m quantforge.cli search c.npz data.npy -k 400 | head -1"
    done = subprocess.run(call, shell=True, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("\n") == 1
    assert not done.stderr


@BOTH
def test_string_ids_and_metadata(
    folder: Path, run: Run, fail: Run, run_json: Callable[..., Any], name: str
) -> None:
    words = [f"doc {i}" for i in range(600)]
    Path("ids.txt").write_text("\n".join(words))
    rows = [{"year": 2000 + i % 20, "lang": "de" if i % 3 else "en"} for i in range(600)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("index", "build", "data.npy", name, "--ids", "ids.txt", "--metadata", "rows.jsonl")
    found = lines(run("search", name, "queries.npy", "-k", "2"))
    assert [row[2] for row in found[::2]] == words[:5]
    where = '{"year": {"gte": 2010}, "lang": "en"}'
    for row in run("search", name, "queries.npy", "--where", where, "--json").splitlines():
        hits = [words.index(word) for word in json.loads(row)["ids"]]
        assert len(hits) == 10
        assert all(rows[i]["year"] >= 2010 and rows[i]["lang"] == "en" for i in hits)
    run("search", name, "queries.npy", "--where", '{"year": 1999}', "-k", "1", "-o", "none.npz")
    assert np.load("none.npz")["ids"].tolist() == [[""]] * 5
    assert not run("search", name, "queries.npy", "--where", '{"year": 1999}')
    none = run("search", name, "queries.npy", "--where", '{"year": 1999}', "--json")
    assert json.loads(none.splitlines()[4]) == {"query": 4, "ids": [], "scores": []}
    table = pa.table({"year": [1999] * 5, "lang": ["fr"] * 5, "x": [[1.0]] * 5})
    parquet.write_table(table, "rows.parquet")
    np.save("ids.npy", np.array(["a", "b", "c", "d", "e"]))
    run("index", "add", name, "queries.npy", "--ids", "ids.npy", "--metadata", "rows.parquet")
    found = lines(run("search", name, "queries.npy", "-k", "1", "--where", '{"year": 1999}'))
    assert [row[2] for row in found] == ["a", "b", "c", "d", "e"]
    assert run_json("index", "remove", name, "a", "doc 1")["vectors"] == 603
    assert "int" in fail("index", "remove", name, "7")
    Path("rows.jsonl").write_text('{"year": 1}\n[]\n')
    message = fail("index", "add", name, "queries.npy", "--metadata", "rows.jsonl")
    assert "line 2 must be a JSON object" in message
    Path("rows.jsonl").write_text('{"year": 1}\n')
    message = fail("index", "add", name, "queries.npy", "--metadata", "rows.jsonl")
    assert "1 lines of metadata for 5 vectors" in message
