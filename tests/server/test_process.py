"""A server as a process: told to stop, killed while it writes, and its log."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from quantforge.server import Client, run
from quantforge.server.client import ServerError
from quantforge.vectordb import IndexStore
from tests.helpers import gaussian
from tests.server.conftest import Serve
from tests.server.test_tensors import NPY, npy

# one process imports everything once; each server is a fork of it
FORGE = """
import os, sys
from quantforge.server import process, app
from quantforge.server.settings import Settings
for line in sys.stdin:
    folder = line.strip()
    if (pid := os.fork()) == 0:
        process.run(Settings(folder=folder, port=0))
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
KILLS = 4
DIM = 32


class Forge:
    """Starts servers, one after the other."""

    def __init__(self) -> None:
        self.log: list[dict] = []
        self._running: int | None = None
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORGE], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        threading.Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.log.append(json.loads(line))
                self._changed.notify_all()

    def start(self, folder: Path) -> tuple[int, str]:
        """Return process id and URL of a new server."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.log.clear()
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        pid = self._running = int(self.process.stdout.readline())
        with self._changed:
            assert self._changed.wait_for(lambda: self._url() is not None, 60), self.log
        url = self._url()
        assert url is not None
        return pid, url

    def _url(self) -> str | None:
        for entry in self.log:
            if "running on" in entry["event"]:
                return entry["event"].split()[3]
        return None

    def ended(self) -> int:
        """Wait for the end of the last server, and return its exit code."""
        assert self.process.stdout is not None
        code = int(self.process.stdout.readline())
        self._running = None
        return code

    def close(self) -> None:
        """End the process, and a server that a failed test left behind."""
        if self._running is not None:
            os.kill(self._running, signal.SIGKILL)
        for file in (self.process.stdin, self.process.stdout):
            assert file is not None
            file.close()
        assert self.process.wait(20) == 0
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    found = Forge()
    yield found
    found.close()


def test_requests_under_way_are_answered_before_the_end(forge: Forge, tmp_path: Path) -> None:
    pid, url = forge.start(tmp_path / "data")
    started = threading.Event()

    def slow() -> Iterator[bytes]:
        body = npy(gaussian(2, 64))
        yield body[:10]
        started.set()
        time.sleep(0.3)
        yield body[10:]

    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(
            httpx.post(f"{url}/compress", content=slow(), headers={"Content-Type": NPY})
        )
    )
    thread.start()
    assert started.wait(10)
    time.sleep(0.1)  # until the first bytes are there
    os.kill(pid, signal.SIGTERM)
    thread.join(20)
    assert [answer.status_code for answer in answers] == [200]
    assert forge.ended() in (0, -signal.SIGTERM)
    assert not (tmp_path / "data" / "scratch").exists()
    lines = [entry for entry in forge.log if entry["event"] == "request"]
    assert [(line["route"], line["status"]) for line in lines] == [("/compress", 200)]
    assert all({"time", "level", "logger", "event"} <= set(entry) for entry in forge.log)


def vectors_of(ids: list[int]) -> np.ndarray:
    return np.stack([np.random.RandomState(i).standard_normal(DIM) for i in ids]).astype("f4")


class Writer(threading.Thread):
    """Adds points and removes some of them, and remembers what was acknowledged."""

    def __init__(self, url: str, first: int) -> None:
        super().__init__()
        self._url, self._next = url, first
        self.added: set[int] = set()
        self.removed: set[int] = set()
        self.unsure: set[int] = set()

    def run(self) -> None:
        with Client(self._url) as client:
            try:
                while True:
                    ids = list(range(self._next, self._next + 3))
                    self._next += 3
                    self.unsure = set(ids)
                    client.add("a", vectors_of(ids), ids)
                    self.added |= set(ids)
                    self.unsure = {ids[1]}
                    client.remove("a", [ids[1]])
                    self.removed.add(ids[1])
            except (httpx.TransportError, ServerError):
                return


def test_what_was_acknowledged_outlives_a_kill(forge: Forge, tmp_path: Path) -> None:
    added: set[int] = set()
    removed: set[int] = set()
    unsure: set[int] = set()
    for kill in range(KILLS):
        pid, url = forge.start(tmp_path / "data")
        with Client(url) as client:
            client.create_collection("a", DIM)
            client.search("a", vectors_of([0]), k=1)  # a damaged collection would say so
        writers = [Writer(url, 1_000_000 * kill + 10_000 * i) for i in range(3)]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + 20
        while any(len(writer.added) < 6 for writer in writers):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        for writer in writers:
            writer.join(20)
            added |= writer.added
            removed |= writer.removed
            unsure |= writer.unsure
        assert forge.ended() == -signal.SIGKILL
        with IndexStore.open(tmp_path / "data" / "collections" / "a", read_only=True) as store:
            there = {int(i) for i in store.index.ids}
            assert added - removed - unsure <= there
            assert not removed & there
            assert there <= added | unsure
            some = sorted(there)[:: max(1, len(there) // 50)]
            similar = store.index.reconstruct(some)
            true = vectors_of(some)
            true /= np.linalg.norm(true, axis=1, keepdims=True)
            assert ((similar * true).sum(1) > 0.9).all()


@pytest.fixture
def logging_restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("quantforge.server", "uvicorn")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_a_folder_in_use_is_refused(
    serve: Serve, tmp_path: Path, logging_restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    serve()
    with pytest.raises(SystemExit) as caught:
        run(folder=tmp_path / "data", port=0)
    assert caught.value.code not in (0, None)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert any(str(os.getpid()) in line.get("traceback", line["event"]) for line in lines)
