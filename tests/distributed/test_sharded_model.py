"""The model of a billion vectors: what it adds up, and that the guide shows what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.sharded_model import NAME, Constants, project, tables

CONSTANTS = Constants(
    call_ms={1: 2.0},
    row_ns={1: 50.0},
    vector_bytes=200.0,
    exchange_ms=1.0,
    rank_ms=0.5,
    merge_ms=0.1,
)


def test_times_add_up() -> None:
    one = CONSTANTS.search_ms(1, 10**6, 4, 1)
    assert one == pytest.approx(4 * 2.0 + 50.0 + 0.1)
    four = CONSTANTS.search_ms(1, 10**6, 4, 4)
    assert four == pytest.approx((4 * 2.0 + 50.0) / 4 + 1.0 + 2 * 0.5 + 0.4)
    assert CONSTANTS.search_ms(1, 10**6, 4, 2, share=1.5) == pytest.approx(1.5 * 29 + 1.0 + 0.2)


def test_bytes_of_a_billion() -> None:
    rows = project(CONSTANTS)
    for row in rows:
        assert row["gib_per_rank"] * row["ranks"] == pytest.approx(200e9 / 2**30)
        assert row["lists_ms"] < row["flat_ms"]
    per_rank = [row["network_kib_per_query"] / (row["ranks"] - 1) for row in rows]
    assert per_rank == pytest.approx([per_rank[0]] * len(rows))
    assert 384 * 4 + 10 * 12 < 1024 * per_rank[0] < 384 * 4 + 10 * 12 + 1024  # and headers


def test_the_guide_has_the_measured_tables() -> None:
    guide = Path(__file__).parents[2].joinpath("docs", "distributed.md").read_text()
    for table in tables(record.load(NAME)["rows"][0]):
        assert table in guide
