"""A server in front of shards: two processes over HTTP, and what it answers without one of them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from torch.distributed import HashStore

from quantforge.server import Settings, create_app
from quantforge.server.bodies import NPY
from quantforge.vectordb.sharded import ShardedIndex
from quantforge.vectordb.shards import search_exactly
from tests.distributed.test_sharded import DIM, new_store, save_shards

QUERIES = np.random.RandomState(2).randn(3, DIM).astype(np.float32)
SEARCH = "/v1/shards/search"


def url_of(server: subprocess.Popen[bytes], log: Path) -> str:
    """Return where a server listens, from its log."""
    while server.poll() is None:
        for line in log.read_text().splitlines():
            event = json.loads(line)["event"] if line.endswith("}") else ""
            if "running on http" in event:
                return event.partition("running on ")[2].split()[0]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start: {log.read_text()}")


def test_two_processes(tmp_path: Path) -> None:
    whole, store = save_shards(tmp_path / "shards", "ip"), new_store()
    command = [sys.executable, "-m", "quantforge.cli", "serve", "--shards", "shards", "--port", "0"]
    # as torchrun does: the store is the launcher's
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
             "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as stderr:
        ranks = [
            subprocess.Popen(
                command, env=os.environ | group | {"RANK": str(rank)}, cwd=tmp_path, stderr=stderr
            )
            for rank in range(2)
        ]
    expected = search_exactly(whole, QUERIES, 10)
    asked = {"queries": QUERIES.tolist(), "k": 10}
    try:
        with httpx.Client(base_url=url_of(ranks[0], log), timeout=60) as client:
            info = client.get("/v1/shards").json()
            assert (info["vectors"], info["dim"], info["metric"]) == (len(whole), DIM, "ip")
            assert sorted(map(len, info["ranks"].values())) == [2, 3]

            found = client.post(SEARCH, json=asked).json()
            assert (found["partial"], found["missing"]) == (False, {})
            np.testing.assert_array_equal(found["ids"], expected[0])
            np.testing.assert_array_equal(np.float32(found["scores"]), expected[1])

            ranks[1].send_signal(signal.SIGSTOP)
            late = client.post(SEARCH, json={**asked, "timeout_s": 0.3})
            assert late.status_code == 503
            assert late.json()["error"]["type"] == "ranks"
            assert "1: 'no answer in" in late.json()["error"]["message"]
            partial = {**asked, "timeout_s": 0.3, "on_failure": "partial"}
            found = client.post(SEARCH, json=partial).json()
            assert (found["partial"], list(found["missing"])) == (True, ["1"])
            assert np.shape(found["ids"]) == (3, 10)
            ranks[1].send_signal(signal.SIGCONT)
            assert client.post(SEARCH, json=asked).json()["ids"] == expected[0].tolist()

            ranks[1].send_signal(signal.SIGSTOP)
            spread = client.post("/v1/shards/rebalance", json={"without": [1]}).json()
            assert list(spread["ranks"]) == ["0"]
            assert client.post(SEARCH, json=asked).json()["ids"] == expected[0].tolist()
        ranks[0].terminate()
        assert ranks[0].wait(20) == -signal.SIGTERM
        ranks[1].send_signal(signal.SIGCONT)
        assert ranks[1].wait(20) == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(20)


@pytest.fixture
def client(tmp_path: Path):
    save_shards(tmp_path / "shards", "l2", texts=True)
    index = ShardedIndex(tmp_path / "shards", HashStore(), 0, 1)
    settings = Settings(folder=tmp_path / "data", max_k=50)
    with TestClient(create_app(settings, index), base_url="http://127.0.0.1:8000") as client:
        yield client


def test_bodies_limits_and_mistakes(client: TestClient) -> None:
    body = io.BytesIO()
    np.save(body, QUERIES)
    as_npy = client.post(
        SEARCH,
        params={"k": 4},
        content=body.getvalue(),
        headers={"Content-Type": NPY},
    )
    as_json = client.post(SEARCH, json={"queries": QUERIES.tolist(), "k": 4})
    assert as_npy.json() == as_json.json()
    assert all(name.startswith("id ") for row in as_json.json()["ids"] for name in row)
    for change, status, kind in (
        ({"k": 51}, 413, "too_large"),
        ({"queries": [[1.0]]}, 400, "input"),
        ({"timeout_s": 0}, 422, "schema"),
        ({"timeout_s": 1e9}, 422, "schema"),
        ({"on_failure": "ignore"}, 422, "schema"),
        ({"recal": 0.9}, 422, "schema"),
    ):
        answer = client.post(SEARCH, json={"queries": QUERIES.tolist(), "k": 4} | change)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
    gone = client.post("/v1/shards/rebalance", json={"without": [0]})
    assert gone.status_code == 422


def test_a_turn_that_does_not_come_is_refused(client: TestClient) -> None:
    front = client.app.state.front  # type: ignore[attr-defined]
    with front._asking(1.0):
        asked = {"queries": QUERIES.tolist(), "timeout_s": 0.05}
        answer = client.post(SEARCH, json=asked)
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "busy")


def test_an_ordinary_server_has_no_such_routes(tmp_path: Path) -> None:
    paths = create_app(Settings(folder=tmp_path)).openapi()["paths"]
    assert not any("shards" in path for path in paths)
