"""`run`: a server in this process, until it is told to stop."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING, Any

import uvicorn

from quantforge.server.app import create_app
from quantforge.server.observe import LOG, JsonFormatter
from quantforge.server.settings import Settings

if TYPE_CHECKING:
    from quantforge.vectordb.sharded import ShardedIndex


def run(
    settings: Settings | None = None, *, sharded: ShardedIndex | None = None, **options: Any
) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first.

    Log lines are JSON on stderr. One process, whatever the number of cores: collections are in
    its memory; `workers` is its number of threads.

    Args:
        settings: how to run; or give its fields as options.
        sharded: an index to front, as `create_app` has it.
        options: fields of `Settings`.

    Raises:
        ConfigError: for settings that cannot be honoured.
        SystemExit: if the address is taken or the folder in use.
    """
    settings = Settings(**options) if settings is None else settings
    configure_logging()
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings, sharded),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=settings.shutdown_timeout_s,
        )
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when it has stopped
        server.run()
    if not server.started:
        sys.exit(1)


def configure_logging() -> None:
    """Send the lines of this server and of uvicorn to stderr, as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in (LOG.name, "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
