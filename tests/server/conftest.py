"""A server of its own for each test, asked without a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient

from quantforge.server import Settings, create_app

Serve = Callable[..., TestClient]
Live = Callable[..., str]


def pytest_configure(config: pytest.Config) -> None:
    """Declare the tests that need a Chromium."""
    config.addinivalue_line(
        "markers", "browser: drives a headless Chromium; runs with `pytest -m browser` alone"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a Chromium, unless it is asked for."""
    if "browser" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server with these settings."""
    with ExitStack() as stack:

        def start(**options: Any) -> TestClient:
            settings = Settings(**{"folder": tmp_path / "data", **options})
            app = create_app(settings)
            client = TestClient(
                app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False
            )
            return stack.enter_context(client)

        yield start


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """Start a server with these settings on a port of its own, in a thread; return its URL."""
    with ExitStack() as stack:

        def start(sharded: Any = None, **options: Any) -> str:
            settings = Settings(**{"folder": tmp_path / "data", "port": 0, **options})
            config = uvicorn.Config(create_app(settings, sharded), port=0, log_config=None)
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run)
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(setattr, server, "should_exit", True)
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.005)
            port = server.servers[0].sockets[0].getsockname()[1]
            return f"http://127.0.0.1:{port}"

        yield start


@pytest.fixture(scope="module")
def shared_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Start one server for the tests of a module that leave it as it was."""
    app = create_app(Settings(folder=tmp_path_factory.mktemp("shared")))
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as found:
        yield found


@pytest.fixture
def client(serve: Serve) -> TestClient:
    """Start a server with the settings that it has by default."""
    return serve()
