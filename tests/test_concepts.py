"""docs/concepts.md shows stored numbers, which can be measured; the reference has all names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import quantforge
from benchmarks import concepts, record
from quantforge import llm, vectordb

DOCS = Path(__file__).parents[1] / "docs"


def test_tables_of_concepts_are_the_stored_numbers() -> None:
    (rows,) = record.load("concepts")["rows"]
    text = (DOCS / "concepts.md").read_text("utf-8")
    for table in (concepts.tables(rows)).values():
        assert table in text


def test_distortion_is_theorys_and_the_equalizer_protects_quiet_channels(tmp_path: Path) -> None:
    result = concepts.measure(512, (128, 1024))
    for row in result["distortion"]:
        assert row["measured"] == pytest.approx(row["theory"], rel=0.05)
        assert row["measured"] > row["bound"]
    loudest = result["outliers"][-1]
    assert loudest["equalized"] < loudest["rotated"] / 4
    short, long = result["cache"]
    assert short["4"] >= short["16"]
    assert long["2"] < long["3"] < long["4"] < long["16"]
    pytest.importorskip("matplotlib")
    concepts.draw(result, tmp_path / "concepts.svg")
    assert (tmp_path / "concepts.svg").read_bytes().startswith(b"<?xml")


def test_the_reference_has_every_public_name() -> None:
    listed = set(re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text("utf-8"), re.M))
    own = {n for n in quantforge.__all__ if n not in ("__version__", "dispatch", "ops")}
    own -= {"QuantForgeCache", "QuantizedTensor"}  # listed in llm; another name of QuantTensor
    expected = {f"quantforge.{name}" for name in own}
    # the function, where a module has the same name
    names = ["fidelity.fidelity" if name == "fidelity" else name for name in llm.__all__]
    expected |= {f"quantforge.llm.{name}" for name in names}
    expected |= {f"quantforge.vectordb.{name}" for name in vectordb.__all__}
    assert listed == expected
