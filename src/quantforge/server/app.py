"""`create_app`: all routes, guards and limits as one ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

import quantforge
from quantforge.server import routes_collections, routes_system, routes_work
from quantforge.server.errors import ErrorBody, install
from quantforge.server.guards import Guard, Limits
from quantforge.server.observe import Metrics, Observe
from quantforge.server.settings import Settings
from quantforge.server.state import Server

if TYPE_CHECKING:
    from quantforge.vectordb.sharded import ShardedIndex

REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused"},
    "5XX": {"model": ErrorBody, "description": "The server failed"},
}


def create_app(settings: Settings | None = None, sharded: ShardedIndex | None = None) -> FastAPI:
    """Return the application; its folder is taken when it starts and left when it ends.

    Args:
        settings: `Settings()` if None.
        sharded: an index to front as rank 0, with routes of its own; nobody else may ask it, and it
            is closed when the application ends.
    """
    settings = Settings() if settings is None else settings
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.server = Server(settings, metrics)
        try:
            yield
        finally:
            await asyncio.to_thread(app.state.server.close)
            if sharded is not None:  # before uvicorn lets a signal end the process
                await asyncio.to_thread(sharded.close)

    app = FastAPI(
        title="quantforge",
        version=quantforge.__version__,
        description="Vectors in 1-8 bits: compress, decompress, measure, and search.",
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
    )
    routers = [routes_system.router, routes_work.router, routes_collections.router]
    if sharded is not None:
        from quantforge.server import routes_shards

        app.state.front = routes_shards.Front(sharded, settings)
        routers.append(routes_shards.router)
    install(app, [r for router in (routes_system.for_all, *routers) for r in router.routes])
    app.include_router(routes_system.for_all, responses=dict(REFUSALS))
    needs_token = [Depends(HTTPBearer(auto_error=False))] if settings.token is not None else []
    for router in routers:
        app.include_router(router, responses=dict(REFUSALS), dependencies=needs_token)
    # the last is the outermost
    app.add_middleware(Limits, settings=settings)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(Observe, metrics=metrics)
    return app
