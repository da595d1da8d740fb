"""Vectors over HTTP: compress, decompress, measure, and collections to search in (extra `server`).

    settings        limits, address, token           app        routes put together
    errors          what a refused request gets      process    one server, until it is told to stop
    observe         log lines, metrics, headers      client     the other side, in Python
    guards          who and how much may come in     bodies     tensors in and out of requests
    work            threads, and jobs for long work  operations compress, decompress, benchmark, ...
    catalog         collections on disk              schemas    JSON of requests and answers
    routes_*        HTTP by topic                    links      what can be asked after an answer
    static          the page at /

`Client` needs httpx alone, the rest FastAPI and uvicorn.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantforge.server.app import create_app
    from quantforge.server.client import Client
    from quantforge.server.process import run
    from quantforge.server.settings import Settings

_LAZY = {
    "Client": "quantforge.server.client",
    "Settings": "quantforge.server.settings",
    "create_app": "quantforge.server.app",
    "run": "quantforge.server.process",
}
EXTRA = ("fastapi", "httpx", "prometheus_client", "uvicorn")

__all__ = ["Client", "Settings", "create_app", "run"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'quantforge.server' has no attribute {name!r}")
    try:
        return getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise ModuleNotFoundError(
            f"the server needs {error.name}: pip install 'quantforge[server]'", name=error.name
        ) from error
