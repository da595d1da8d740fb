"""Routes: whether the server is there and ready, its metrics, and the page at /."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import quantforge
from quantforge.server.errors import ApiError
from quantforge.server.schemas import Health, Version
from quantforge.server.state import Running

router = APIRouter()
for_all = APIRouter()
"""Routes that need no token."""

STATIC = Path(__file__).with_name("static")
FILES = {
    "app.js": "text/javascript",
    "charts.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
TEXT: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}


@for_all.get("/health")
async def health() -> Health:
    """Answer as long as the process does."""
    return Health(status="ok")


@for_all.get("/ready")
async def ready(server: Running) -> Health:
    """Answer as long as requests can be served: the disk takes changes."""
    folder = server.settings.folder
    if not os.access(folder, os.W_OK):
        raise ApiError(503, "not_ready", f"{folder} cannot be written to")
    return Health(status="ok")


@router.get("/metrics", response_class=Response, responses={200: {"content": TEXT}})
async def metrics(server: Running) -> Response:
    """Return the counters, as Prometheus reads them."""
    for state in ("waiting", "running", "done", "failed", "cancelled"):
        count = sum(job.state == state for job in server.jobs.all())
        server.metrics.jobs.labels(state).set(count)
    return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def get_version(server: Running) -> Version:
    """Tell what is running."""
    return Version(
        quantforge=quantforge.__version__,
        torch=version("torch"),
        python=platform.python_version(),
        device=server.settings.device,
    )


@for_all.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Return the page."""
    return FileResponse(STATIC / "index.html", media_type="text/html; charset=utf-8")


@for_all.get("/static/{name}", include_in_schema=False)
async def static(name: Annotated[str, PathParameter(max_length=64)]) -> FileResponse:
    """Return a file of the page."""
    if name not in FILES:
        raise HTTPException(404, f"the page has no file {name!r}")
    return FileResponse(STATIC / name, media_type=FILES[name])
