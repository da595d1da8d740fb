"""Who may come in, how much they may bring, and what the outside sees of it."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from quantforge.errors import ConfigError, InputError
from quantforge.server import Settings, create_app
from quantforge.server.bodies import NPY
from quantforge.server.observe import HEADERS, JsonFormatter
from quantforge.server.settings import read_token
from tests.helpers import gaussian
from tests.server.conftest import Live, Serve
from tests.server.test_tensors import error_of, npy

TOKEN = "a-token-of-some-length"


def test_a_token_is_asked_for(serve: Serve) -> None:
    client = serve(token=TOKEN)
    for path in ("/version", "/metrics", "/openapi.json", "/v1/collections", "/nowhere"):
        answer = client.get(path)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert error_of(answer)["type"] == "token"
    for wrong in (f"Bearer {TOKEN}x", "Bearer", f"Basic {TOKEN}", TOKEN, "Bearer é"):
        headers = {"Authorization": wrong.encode()}
        assert client.get("/version", headers=headers).status_code == 401, wrong
    for right in (f"Bearer {TOKEN}", f"bearer  {TOKEN}"):
        assert client.get("/version", headers={"Authorization": right}).status_code == 200
    for path in ("/", "/health", "/ready", "/static/style.css"):
        assert client.get(path).status_code == 200, path


def test_a_refused_request_changes_nothing(serve: Serve) -> None:
    client = serve(token=TOKEN)
    assert client.put("/v1/collections/a", json={"dim": 64}).status_code == 401
    found = client.get("/v1/collections", headers={"Authorization": f"Bearer {TOKEN}"})
    assert found.json()["collections"] == []


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8000", 200), ("localhost", 200), ("[::1]:8000", 200), ("evil.example", 403),
     ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("", 403)],
)  # fmt: skip
def test_without_a_token_only_names_of_this_machine_are_answered(
    shared_client: TestClient, host: str, status: int
) -> None:
    assert shared_client.get("/version", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_open_address_needs_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="token"):
        Settings(host=host)
    assert Settings(host=host, token=TOKEN).host == host


def test_settings_are_checked(tmp_path) -> None:
    for bad in ({"port": 70_000}, {"workers": 0}, {"token": "short"}, {"token": "é" * 20}):
        with pytest.raises(ConfigError):
            Settings(**bad)
    assert TOKEN not in repr(Settings(token=TOKEN))
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    assert read_token(path, {}) == TOKEN
    assert read_token(None, {"QUANTFORGE_TOKEN": TOKEN}) == TOKEN
    assert read_token(None, {}) is None
    path.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        read_token(path, {})


def test_bytes_are_counted_as_they_arrive(serve: Serve) -> None:
    client = serve(max_body_bytes=1000)
    arrived = 0

    def pieces() -> Iterator[bytes]:
        nonlocal arrived
        for _ in range(100):
            arrived += 100
            yield b"x" * 100

    answer = client.post("/compress", content=pieces(), headers={"Content-Type": NPY})
    assert answer.status_code == 413
    assert "1000 bytes" in error_of(answer)["message"]
    answer = client.put("/v1/collections/a", json={"dim": 64, "mode": "x" * 1000})
    assert answer.status_code == 413, "bodies that FastAPI reads count too"


def test_json_has_a_limit_of_its_own(serve: Serve) -> None:
    client = serve(max_json_bytes=1000)
    answer = client.post("/compress", json={"vectors": gaussian(20, 64).tolist()})
    assert answer.status_code == 413
    assert "safetensors" in error_of(answer)["remedy"]


def test_bodies_of_all_requests_have_a_limit(serve: Serve) -> None:
    client = serve(max_inflight_bytes=1000)
    answer = client.post("/compress", content=npy(gaussian(20, 64)), headers={"Content-Type": NPY})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    small = client.post("/compress", content=npy(gaussian(1, 64)), headers={"Content-Type": NPY})
    assert small.status_code == 200, "what was refused counts no more"


def test_more_requests_than_the_limit_are_refused(live: Live) -> None:
    """Two wait for their bodies; a third is told to come again, but the light routes answer."""
    go = threading.Event()

    def slow() -> Iterator[bytes]:
        body = npy(gaussian(2, 64))
        yield body[:10]
        assert go.wait(10)
        yield body[10:]

    def send() -> int:
        headers = {"Content-Type": NPY}
        return client.post("/compress", content=slow(), headers=headers).status_code

    with httpx.Client(base_url=live(max_pending=2)) as client, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(send) for _ in range(2)]
        try:
            deadline = time.monotonic() + 10
            while "inside 3.0" not in client.get("/metrics").text:  # they and this one
                assert time.monotonic() < deadline
            assert client.get("/v1/collections").status_code == 429
            assert client.get("/health").status_code == 200
            assert client.get("/metrics").status_code == 200
        finally:
            go.set()
        assert [f.result() for f in waiting] == [200, 200]
        deadline = time.monotonic() + 10
        while client.get("/v1/collections").status_code != 200:  # a request leaves after its answer
            assert time.monotonic() < deadline


def test_a_body_that_breaks_off_is_no_failure_of_the_server(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    url = httpx.URL(live())
    head = f"POST /compress HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {NPY}\r\n"
    with caplog.at_level(logging.INFO):
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(head.encode() + b"Content-Length: 1000\r\n\r\nhalf")
            time.sleep(0.2)
        deadline = time.monotonic() + 10
        while not (found := [r for r in caplog.records if r.message == "request"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert [record.data["status"] for record in found] == [400]  # type: ignore[attr-defined]
    assert all(record.exc_info is None for record in caplog.records)


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    app = create_app(Settings(folder=tmp_path / "data", device="cuda:99"))
    with pytest.raises(ConfigError, match="cuda:99"), TestClient(app):
        pass


def test_metrics_know_routes_and_not_paths(client: TestClient) -> None:
    client.put("/v1/collections/secret-name", json={"dim": 64})
    client.get("/v1/collections/secret-name")
    client.get("/a/path/nobody/knows")
    client.request("BREW", "/health")
    text = client.get("/metrics").text
    route = 'route="/v1/collections/{name}",status="200"} 1.0'
    assert f'quantforge_http_requests_total{{method="GET",{route}' in text
    assert 'method="GET",route="unmatched",status="404"} 1.0' in text
    assert "nobody" not in text
    assert 'quantforge_collection_vectors{collection="secret-name"} 0.0' in text
    assert "BREW" not in text


def test_every_answer_has_headers_and_a_number(client: TestClient) -> None:
    answers = [client.get(path) for path in ("/", "/health", "/nowhere", "/v1/jobs")]
    for answer in answers:
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


def test_requests_are_logged_as_json(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "quantforge.server"):
        answer = client.get("/v1/jobs/none?token=secret")
    line = json.loads(JsonFormatter().format(caplog.records[-1]))
    assert line["event"] == "request"
    assert line["id"] == answer.headers["x-request-id"]
    assert (line["method"], line["route"], line["status"]) == ("GET", "/v1/jobs/{id}", 404)
    assert line["bytes_out"] == len(answer.content)
    assert "secret" not in json.dumps(line)


def test_a_failure_is_logged_and_not_shown(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()

    def broken(*_: object) -> None:
        raise RuntimeError("a path, a password")

    monkeypatch.setattr("quantforge.server.catalog.Catalog.names", broken)
    answer = client.get("/v1/collections")
    assert answer.status_code == 500
    assert error_of(answer)["type"] == "internal"
    assert "password" not in answer.text
    assert 'status="500"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("error", "status"),
    [(MemoryError(), 503), (OSError(28, "No space left on device"), 507), (OSError(5, "x"), 500)],
)
def test_what_the_machine_lacks_is_said(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("quantforge.server.catalog.Catalog.names", broken)
    answer = client.get("/v1/collections")
    assert answer.status_code == status
    assert error_of(answer)


def test_one_server_a_folder(serve: Serve, tmp_path) -> None:
    serve()
    app = create_app(Settings(folder=tmp_path / "data"))
    with pytest.raises(InputError, match="open for writing"), TestClient(app):
        pass
