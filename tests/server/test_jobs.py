"""Long operations: how far they are, their results, and their end before that."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from quantforge.errors import InputError
from quantforge.server.work import Answer, Jobs, Progress
from tests.helpers import gaussian
from tests.server.conftest import Serve
from tests.server.test_tensors import NPY, error_of, npy, post, tensors

BACKGROUND = {"background": True}


def wait(client: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while job["state"] in ("waiting", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
        job = client.get(f"/v1/jobs/{job['id']}").json()
    return job


def test_a_job_gives_the_same_result(client: TestClient, tmp_path: Path) -> None:
    body = npy(gaussian(50, 64))
    direct = post(client, "/compress", body, NPY, bits=2)
    answer = post(client, "/compress", body, NPY, bits=2, **BACKGROUND)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["kind"] == "compress"
    job = wait(client, job)
    assert (job["state"], job["progress"], job["error"]) == ("done", 1, None)
    for _ in range(2):
        result = client.get(job["result"])
        assert result.content == direct.content
        assert result.headers["content-type"] == direct.headers["content-type"]
    assert set(tensors(result.content, tmp_path)) == {"vectors"}


def test_long_ones_become_jobs_unless_told_otherwise(serve: Serve) -> None:
    client = serve(job_numbers=1000)
    body = npy(gaussian(50, 64))
    assert post(client, "/compress", npy(gaussian(2, 64)), NPY).status_code == 200
    assert post(client, "/compress", body, NPY).status_code == 202
    assert post(client, "/compress", body, NPY, background=False).status_code == 200
    assert (
        client.post("/benchmark", json={"vectors": gaussian(5, 64).tolist()}).status_code == 202
    ), "eight widths are eight times the work"


def test_a_failure_is_the_jobs(client: TestClient) -> None:
    x = gaussian(5, 64)
    x[2] = float("nan")
    job = wait(client, post(client, "/compress", npy(x), NPY, **BACKGROUND).json())
    assert job["state"] == "failed"
    assert job["error"]["type"] == "input"
    result = client.get(f"/v1/jobs/{job['id']}/result")
    assert result.status_code == 400
    assert error_of(result)["message"] == job["error"]["message"]


def test_forgotten_with_its_files(client: TestClient, tmp_path: Path) -> None:
    job = wait(client, post(client, "/compress", npy(gaussian(5, 64)), NPY, **BACKGROUND).json())
    assert len(list((tmp_path / "data" / "scratch").iterdir())) == 1
    assert client.delete(f"/v1/jobs/{job['id']}").json()["state"] == "done"
    assert client.get(f"/v1/jobs/{job['id']}").status_code == 404
    assert client.get("/v1/jobs").json() == {"jobs": []}
    assert list((tmp_path / "data" / "scratch").iterdir()) == []


class Held:
    """An operation that is under way until it is let go or cancelled."""

    def __init__(self) -> None:
        self.started, self.go = threading.Event(), threading.Event()

    def __call__(self, progress: Progress) -> Answer:
        self.started.set()
        for step in range(2000):
            progress(step / 2000)
            if self.go.wait(0.005):
                break
        return {"done": True}


@pytest.fixture
def jobs() -> Any:
    found = Jobs(limit=2)
    yield found
    found.close()


def until_closed(job: Any) -> str:
    deadline = time.monotonic() + 10
    while job.is_open:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return job.state


def test_a_cancelled_job_stays_until_it_is_deleted_once_more(
    client: TestClient, tmp_path: Path
) -> None:
    held = Held()
    job = client.app.state.server.jobs.start("held", held, tmp_path / "a")  # type: ignore[attr-defined]
    path = f"/v1/jobs/{job.id}"
    assert held.started.wait(10)
    assert client.delete(path).status_code == 202
    assert until_closed(job) == "cancelled"
    assert client.get(path).json()["state"] == "cancelled"
    assert client.delete(path).status_code == 200
    assert client.get(path).status_code == 404


def test_a_running_job_ends_when_it_is_cancelled(jobs: Jobs, tmp_path: Path) -> None:
    held = Held()
    job = jobs.start("held", held, tmp_path / "a")
    waiting = jobs.start("held", held, tmp_path / "b")
    assert held.started.wait(10)
    assert job.info().state == "running"
    assert jobs.cancel(waiting.id).info().state == "cancelled"
    time.sleep(0.05)
    assert 0 < job.info().progress < 1
    jobs.cancel(job.id)
    assert until_closed(job) == "cancelled"
    assert job.answer is None


def test_too_many_are_refused_and_old_ones_forgotten(jobs: Jobs, tmp_path: Path) -> None:
    held = Held()
    first = [jobs.start("held", held, tmp_path / name) for name in "ab"]
    with pytest.raises(Exception, match="2 jobs") as caught:
        jobs.start("held", held, tmp_path / "c")
    assert caught.value.status_code == 429  # type: ignore[attr-defined]
    held.go.set()
    assert [until_closed(job) for job in first] == ["done", "done"]
    last = [jobs.start("held", held, tmp_path / name) for name in "cd"]
    assert [until_closed(job) for job in last] == ["done", "done"]
    assert jobs.all() == [first[1], *last] or jobs.all() == last


def test_what_goes_wrong_inside_is_kept(jobs: Jobs, tmp_path: Path) -> None:
    def wrong(_: Progress) -> Answer:
        raise InputError("of no use")

    def broken(_: Progress) -> Answer:
        raise ZeroDivisionError("a secret")

    found = [jobs.start("x", operation, tmp_path / "a") for operation in (wrong, broken)]
    assert [until_closed(job) for job in found] == ["failed", "failed"]
    assert found[0].info().error == {"type": "input", "message": "of no use"}
    assert "secret" not in str(found[1].info())


def test_a_server_that_stops_ends_its_jobs(tmp_path: Path) -> None:
    jobs, held = Jobs(limit=2), Held()
    job = jobs.start("held", held, tmp_path / "a")
    assert held.started.wait(10)
    start = time.monotonic()
    jobs.close()
    assert time.monotonic() - start < 5
    assert job.state == "cancelled"
