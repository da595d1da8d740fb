"""The long run: what it asserts holds, and fails where it should."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import soak
from benchmarks.record import load
from quantforge import QuantForgeCache
from quantforge.llm.store import Store


@pytest.mark.parametrize("kind", ["growing", "sliding"])
def test_memory_grows_by_the_packed_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(soak, "WINDOW", 260)
    arguments = [f"--models={kind}", "--tokens=600", "--every=100", f"--output={tmp_path}"]
    soak.main([*arguments, "--untimed", f"--plot={tmp_path}"])
    rows = load(f"soak_{kind}_cpu", tmp_path)["rows"]
    assert [row["tokens"] for row in rows] == [100, 200, 300, 400, 500, 600]
    assert rows[-1]["packed_tokens"] > 0
    held = rows[-1]["packed_tokens"] + rows[-1]["dense_tokens"]
    assert held == (600 if kind == "growing" else 259)
    assert (tmp_path / f"soak_{kind}_cpu.svg").stat().st_size > 1000
    parts = [rows[-1][f"{part}_ms"] for part in ("attention", "append", "rest")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(rows[-1]["step_ms"], rel=0.5)


def row(n: int, **changes: Any) -> dict[str, Any]:
    """Return what a run that does everything right says of n tokens."""
    out: dict[str, Any] = {"tokens": n, "packed_tokens": n - 100, "dense_tokens": 100}
    out |= {"packed_row_bytes": 68, "dense_row_bytes": 512}
    out |= {"held_bytes": 68 * (n - 100) + 51200 + 512, "append_mean_ms": 0.4, "rest_ms": 2.0}
    return out | {"allocated_bytes": out["held_bytes"]} | changes


RIGHT = [row(n) for n in range(1000, 10000, 1000)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_bytes": RIGHT[-1]["held_bytes"] + 1}, "held_bytes"),
        ({"allocated_bytes": 2 * RIGHT[-1]["held_bytes"]}, "allocated_bytes"),
    ],
    ids=["leak", "slack"],
)
def test_a_leak_is_noticed(changes: dict[str, int], message: str) -> None:
    soak.check(RIGHT, 64)
    with pytest.raises(AssertionError, match=message):
        soak.check([*RIGHT[:-1], RIGHT[-1] | changes], 64)


@pytest.mark.parametrize("part", ["append_mean_ms", "rest_ms"])
def test_a_slowdown_is_noticed(part: str) -> None:
    slower = [copy.copy(r) | {part: r[part] * (1 + i / 4)} for i, r in enumerate(RIGHT)]
    with pytest.raises(AssertionError, match=f"{part} rose"):
        soak.check(slower, 64)
    soak.check(slower, 64, timed=False)


def test_too_short_a_run_is_no_run() -> None:
    with pytest.raises(AssertionError, match="too few tokens"):
        soak.check(RIGHT[:1], 64)


def test_growing_copies_each_packed_row_a_bounded_number_of_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Buffers grow by an eighth, so that copies stay in proportion to what is held."""
    copied = 0
    grown = Store._grown

    def counting(self: Store, buffer: torch.Tensor, dim: int, used: int, *args: Any) -> Any:
        nonlocal copied
        out = grown(self, buffer, dim, used, *args)
        copied += used if out is not buffer and dim == 2 and out.shape[-1] > 1 else 0
        return out

    monkeypatch.setattr(Store, "_grown", counting)
    cache = QuantForgeCache(page_size=1, window=0, sinks=0, bits=1)
    x = torch.randn(1, 1, 1, 8)
    tokens = 2000
    for _ in range(tokens):
        cache.update(x, x, 0)
    assert 0 < copied < 2 * 9 * tokens  # keys and values; 8 + 1 = the sum of (8 / 9) ** k
