"""`Client` against a server on a port."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from quantforge import QuantForgeConfig, QuantTensor
from quantforge.server import Client
from quantforge.server.client import ServerError
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
