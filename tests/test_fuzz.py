"""Some of what `tests.fuzz` reads, and that it notices what it is there to notice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantforge import FormatError
from tests import fuzz
from tests.fuzz import Reader, readers, run, run_files
from tests.limits import limited_address_space


def _reader(read: object) -> dict[str, Reader]:
    return {"x": Reader("x", {"x": b"0123456789"}, read)}  # type: ignore[arg-type]


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    kinds = readers()
    outcome = run(kinds, seed=1, cases=range(20 * len(kinds)), folder=tmp_path)
    assert outcome.failures == {}
    assert (outcome.read + outcome.refused).keys() == kinds.keys()
    assert outcome.read.total() > 20
    assert outcome.refused.total() > 100


def test_a_case_is_the_same_again(tmp_path: Path) -> None:
    seen: list[bytes] = []
    kinds = _reader(lambda folder: seen.append((folder / "x").read_bytes()))
    run(kinds, seed=3, cases=range(10), folder=tmp_path)
    run(kinds, seed=3, cases=range(5, 10), folder=tmp_path)
    assert seen[6:11] == seen[12:]
    assert len(set(seen)) > 5


def test_other_errors_are_failures(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        body = (folder / "x").read_bytes()
        if len(body) < 10:
            raise ValueError("short")
        if body != b"0123456789":
            raise FormatError("changed")

    outcome = run(_reader(read), seed=0, cases=range(60), folder=tmp_path)
    ((where, failure),) = outcome.failures.items()
    assert where.startswith("ValueError test_fuzz.py:")
    assert failure["error"] == "short"
    assert len(failure["cases"]) + outcome.refused.total() + outcome.read.total() == 60


def test_time_and_memory_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def slow(folder: Path) -> None:
        calls.append(0)
        if len(calls) > 1:
            time.sleep(5)

    monkeypatch.setattr(fuzz, "MAX_SECONDS", 0.05)
    outcome = run(_reader(slow), seed=0, cases=range(1), folder=tmp_path)
    assert [f["error"] for f in outcome.failures.values()] == ["longer than 0.05 s"]
    with limited_address_space(64 << 20), pytest.raises(MemoryError):
        np.ones(1 << 28)
    held: list[np.ndarray] = []
    monkeypatch.setattr(fuzz, "MAX_GROWTH", 8 << 20)
    monkeypatch.setattr(fuzz, "peak_bytes", lambda: sum(a.nbytes for a in held))
    outcome = run(
        _reader(lambda folder: held.append(np.ones(1 << 19))), seed=0, cases=range(3),
        folder=tmp_path,
    )  # fmt: skip
    assert any("peak grew" in f["error"] for f in outcome.failures.values())


def test_a_run_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_mended = False

    def read(folder: Path) -> None:
        body = (folder / "x").read_bytes()
        if len(body) < 10 and not is_mended:
            raise ValueError("short")
        if body != b"0123456789":
            raise FormatError("changed")

    def ran(result: dict[str, Any], cases: range, output: Path | None = None) -> dict[str, Any]:
        run_files(result, "", cases, float("inf"), output)
        return {name: result["files"][name] for name in ("cases", "read", "refused", "failures")}

    monkeypatch.setattr(fuzz, "readers", lambda: _reader(read))
    monkeypatch.setattr(fuzz, "PART", 7)
    output = tmp_path / "fuzz.json"
    whole = ran({"seed": 4}, range(5, 65))
    begun = {"seed": 4, "environment": {"commit": "before"}}
    assert ran(begun, range(5, 25), output)["cases"] == 20
    resumed = fuzz.resumed(output, 4)
    assert ran(resumed, range(5, 65), output) == whole
    assert "before, " in resumed["environment"]["commit"]
    ((_, failure),) = whole["failures"].items()
    assert len(failure["cases"]) > 3

    is_mended = True
    resumed = fuzz.resumed(output, 4)
    assert ran(resumed, range(5, 65), output) == whole | {"failures": {}}
    assert resumed["files"]["mended"] == whole["failures"]
    with pytest.raises(SystemExit, match="go on with --seed 4"):
        fuzz.resumed(output, 5)
    with pytest.raises(SystemExit, match="another case"):
        ran(fuzz.resumed(output, 4), range(6, 65), output)
