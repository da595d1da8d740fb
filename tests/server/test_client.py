"""`Client` against a server on a port."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from quantforge import QuantForgeConfig, QuantTensor
from quantforge.server import Client
from quantforge.server.client import ServerError
from quantforge.vectordb.sharded import RankError, ShardedResult
from quantforge.vectordb.shards import search_exactly
from tests.distributed.test_sharded import in_threads, save_shards
from tests.helpers import gaussian
from tests.server.conftest import Live

TOKEN = "a-token-of-some-length"


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live(token=TOKEN, job_numbers=10_000), token=TOKEN) as found:
        yield found


@pytest.mark.parametrize("rows", [5, 500], ids=["at once", "as a job"])
def test_tensors_there_and_back(client: Client, rows: int) -> None:
    x = gaussian(rows, 64)
    q = client.compress(x, bits=3, scale_rule="mse")
    expected = QuantTensor.quantize(torch.from_numpy(x), QuantForgeConfig(bits=3, scale_rule="mse"))
    assert torch.equal(q.packed, expected.packed)
    assert torch.equal(client.decompress(q), expected.dequantize())
    assert [row["bits"] for row in client.benchmark(x, bits=[2, 4])["rows"]] == [2, 4]


def test_collections(client: Client) -> None:
    assert client.version()["device"] == "cpu"
    assert client.create_collection("notes", 64, bits=8)["vectors"] == 0
    x = gaussian(50, 64)
    assert client.add("notes", x) == list(range(50))
    assert client.add("notes", gaussian(1, 64, seed=1), ids=np.array([900])) == [900]
    ids, scores = client.search("notes", x[:3], k=2)
    assert [found[0] for found in ids] == [0, 1, 2]
    assert scores[0][0] > scores[0][1]
    assert client.search("notes", like=[7], k=1)[0] == [[7]]
    assert client.remove("notes", [900, 7]) == 2
    assert client.collection("notes")["vectors"] == 49
    assert [c["name"] for c in client.collections()] == ["notes"]
    client.delete_collection("notes")
    assert client.collections() == []


def test_shards(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = save_shards(tmp_path / "shards", "ip")
    queries = gaussian(3, whole.dim)
    expected = search_exactly(whole, queries, 10)
    with in_threads(tmp_path / "shards", 2) as index, Client(live(index)) as client:
        info = client.shards()
        assert (info["vectors"], info["dim"], sorted(info["ranks"])) == (600, whole.dim, ["0", "1"])
        found = client.search_shards(queries)
        np.testing.assert_array_equal(found.ids, expected[0])
        np.testing.assert_array_equal(np.float32(found.scores), expected[1])
        assert found.missing == {}
        assert np.shape(client.search_shards(torch.from_numpy(queries), 4).ids) == (3, 4)

        given: dict[str, Any] = {}
        search = index.search

        def without_rank_1(*args: Any, **options: Any) -> ShardedResult:
            given.update(options)
            if options["on_failure"] == "error":
                raise RankError({1: "no answer in 2 s"})
            return ShardedResult(search(*args, **options), {1: "no answer in 2 s"})

        monkeypatch.setattr(index, "search", without_rank_1)
        with pytest.raises(ServerError, match="no answer in 2 s") as caught:
            client.search_shards(queries, timeout_s=2.0)
        assert (caught.value.status, caught.value.type) == (503, "ranks")
        found = client.search_shards(queries, recall=0.9, timeout_s=2.0, on_failure="partial")
        assert found.missing == {1: "no answer in 2 s"}
        assert 1.0 < given["timeout"] <= 2.0
        assert given["recall"] == 0.9

        assert client.rebalance_shards([1])["ranks"] == {
            "0": [f"{i}.safetensors" for i in range(5)]
        }
        assert sorted(client.rebalance_shards(timeout_s=30.0)["ranks"]) == ["0", "1"]


def test_a_server_without_shards_says_so(client: Client) -> None:
    with pytest.raises(ServerError) as caught:
        client.shards()
    assert (caught.value.status, caught.value.type) == (404, "not_found")


def test_what_is_refused_is_raised(client: Client, live: Live) -> None:
    with pytest.raises(ServerError, match="no collection") as caught:
        client.collection("none")
    assert (caught.value.status, caught.value.type) == (404, "not_found")
    bad = gaussian(500, 64)
    bad[3] = np.nan
    with pytest.raises(ServerError, match="NaN") as caught:
        client.compress(bad)  # as a job
    assert caught.value.status == 400


def test_without_the_token(live: Live, tmp_path: Any) -> None:
    with Client(live(token=TOKEN)) as client, pytest.raises(ServerError, match="token") as caught:
        client.collections()
    assert caught.value.status == 401
    assert caught.value.remedy is not None


def test_a_busy_server_is_asked_again() -> None:
    answers = [429, 429, 200]

    def answer(_: httpx.Request) -> httpx.Response:
        status = answers.pop(0)
        error = {"error": {"type": "busy", "message": "full"}}
        body = {"collections": []} if status == 200 else error
        return httpx.Response(status, json=body, headers={"Retry-After": "0"})

    with Client(transport=httpx.MockTransport(answer), retries=2) as client:
        assert client.collections() == []
    answers = [429, 429]
    with (
        Client(transport=httpx.MockTransport(answer), retries=1) as client,
        pytest.raises(ServerError, match="full"),
    ):
        client.collections()


def test_an_answer_that_is_no_server_of_ours() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(502, text="<html>Bad Gateway"))
    with Client(transport=transport) as client, pytest.raises(ServerError, match="Bad Gateway"):
        client.collections()
