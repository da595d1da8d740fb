"""The report of a machine: every part is measured, named where it cannot run, and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import full, record
from tests.helpers import threads

TINY = full.Sizes(
    vectors=256,
    contexts=(128, 1024),
    rows=400,
    queries=20,
    indexes="adapted [24] bits$|FAISS Flat",
    prompt=96,
    decode=4,
    texts=1,
    keys=256,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with threads(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(full, "ceilings", lambda device: {"read_gbps": 10.0})
        return full.write_report(TINY, "cpu", tmp_path_factory.mktemp("report"))


def test_all_parts_are_there(report: Path) -> None:
    text = report.read_text("utf-8")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(full.PARTS)
    assert f"| date | {record.environment('cpu')['date']} |" in text
    (error,) = record.load("error_and_memory", report.parent)["rows"]
    assert [row["bits"] for row in error["distortion"]] == list(range(1, 9))
    assert f"{error['distortion'][3]['measured']:.6f}" in text
    assert "| quantforge adapted 4 bits |" in text
    assert "400 x 256 hidden states of the tiny model" in text
    assert text.count('preset "') == 3
    for line in text.splitlines():
        if line.startswith("!["):
            name = line.partition("](")[2].rstrip(")")
            assert (report.parent / name).read_bytes().startswith(b"<?xml")
    assert not (report.parent / "vectors.npy").exists()


def test_the_roofline_counts_the_bytes_of_codes(report: Path) -> None:
    path = report.parent / "decode.json"
    if not path.exists():
        assert "Not measured: there is no native library" in report.read_text("utf-8")
        return
    for row in json.loads(path.read_text())["rows"]:
        nbytes = 2 * row["kv_heads"] * 256 * (128 * row["bits"] // 8 + 2)
        assert row["floor_ms"] == pytest.approx(nbytes / 10.0e9 * 1e3)


def test_parts_that_cannot_run_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "library", lambda: "no compiler")
    monkeypatch.setattr(full, "PARTS", {"Decode speed": full.decode_speed})
    monkeypatch.setattr(full, "figures_can_be_drawn", lambda: False)
    text = full.write_report(TINY, "cpu", tmp_path).read_text("utf-8")
    assert "Not measured: there is no native library: no compiler." in text
    assert "matplotlib is not installed" in text
    with pytest.raises(SystemExit):
        full.main(["--device", "tpu"])
