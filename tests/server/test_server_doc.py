"""docs/server.md is true: its code runs, its limits and types are those there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.record import load
from benchmarks.server_load import NAME, percentile, summary, with_table
from quantforge.server import Client, Settings, routes_shards
from quantforge.server.errors import TYPES
from quantforge.vectordb.shards import search_exactly
from tests.distributed.test_sharded import in_threads, save_shards
from tests.helpers import gaussian
from tests.server.conftest import Live
from tests.test_docs import python_blocks

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "server.md"
TEXT = DOC.read_text("utf-8")


def test_its_code_runs(live: Live) -> None:
    block, _ = python_blocks(DOC)
    scope: dict[str, Any] = {}
    exec(compile(block.replace("http://127.0.0.1:8000", live()), DOC.name, "exec"), scope)
    assert scope["codes"].nbytes_packed == 1000 * (64 * 4 // 8 + 2)
    assert scope["restored"].shape == scope["vectors"].shape
    assert [ids[0] for ids in scope["found"]] == scope["ids"][:3]
    assert all(id % 25 >= 20 for id in scope["recent"][0])


def test_its_code_about_shards_runs(live: Live, tmp_path: Path) -> None:
    _, block = python_blocks(DOC)
    whole = save_shards(tmp_path / "shards", "ip")
    scope: dict[str, Any] = {"Client": Client, "queries": gaussian(3, whole.dim)}
    with in_threads(tmp_path / "shards", 2) as index:
        code = block.replace("http://127.0.0.1:8000", live(index))
        exec(compile(code, DOC.name, "exec"), scope)
    assert sorted(scope["files_by_rank"]) == ["0", "1"]
    assert scope["missing"] == {}
    expected = search_exactly(whole, scope["queries"], 5)
    np.testing.assert_array_equal(scope["ids"], expected[0])


def test_it_names_the_routes_of_shards() -> None:
    for route in routes_shards.router.routes:
        path = route.path  # type: ignore[attr-defined]
        assert path.replace("/v1/shards/rebalance", ".../rebalance") in TEXT, path
    for model in (routes_shards.ShardSearch, routes_shards.Rebalance):
        for field in model.model_fields:
            assert f"`{field}`" in TEXT, field


def test_it_names_all_limits_and_types(client: Any) -> None:
    settings = Settings()
    for name in vars(settings):
        if name.startswith("max_") or name.endswith("_s"):
            assert f"`{name}`" in TEXT, name
    for kind in TYPES.values():
        assert f"`{kind}`" in TEXT, kind
    for path in client.get("/openapi.json").json()["paths"]:
        short = path.rsplit("/", 1)[-1] if path.endswith(("compact", "version")) else path
        assert short in TEXT, path


def test_its_table_is_the_result() -> None:
    result = load(NAME)
    assert with_table(TEXT, result) == TEXT, "run python -m benchmarks.server_load --document"
    assert {row["errors"] for row in result["rows"]} == {0}
    assert result["rows"][0]["seconds"] >= 60
    assert result["rows"][0]["clients"] == 64


def test_a_load_is_summed_up() -> None:
    rows = summary({"search": [float(i) for i in range(100)], "add": [200.0]}, seconds=10)
    by_kind = {row["request"]: row for row in rows}
    assert by_kind["search"]["per_s"] == 10
    assert (by_kind["search"]["p50_ms"], by_kind["search"]["p99_ms"]) == (50, 99)
    assert (by_kind["all"]["count"], by_kind["all"]["max_ms"]) == (101, 200)
    assert percentile([3.0], 0.99) == 3.0
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("name", ["server_light.png", "server_dark.png"])
def test_the_screenshots_are_there(name: str) -> None:
    assert re.search(rf"\]\({name}\)", TEXT)
    assert (ROOT / "docs" / name).read_bytes().startswith(b"\x89PNG")
