"""Who may come in and how much they may bring: ASGI middlewares, before anything is parsed."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from quantforge.server.errors import ApiError, busy, response_of, too_large
from quantforge.server.settings import Settings, is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/", "/health", "/ready")
OPEN_PREFIX = "/static/"
"""Paths that need no token: the page asks for it, and then sends it."""
LIGHT = (*OPEN, "/metrics", "/version", "/openapi.json")
"""Paths that a server at its limit still answers."""


def host_name(header: str) -> str:
    """Return the name in a Host header, without the port."""
    name, _, port = header.rpartition(":")
    return name if name and port.isdigit() else header


class Guard:
    """Lets in requests with the token, or, where there is none, from this machine's own names.

    The second keeps a page of another site from reaching a server on loopback through a name that
    it made point there.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._token = None if settings.token is None else settings.token.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse a request."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is not None:
            await response_of(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(raw=scope["headers"])
        if self._token is None:
            host = host_name(headers.get("host", ""))
            if is_loopback(host):
                return None
            message = f"a server without a token answers to its loopback names only; got {host!r}"
            return ApiError(403, "host", message, "ask 127.0.0.1, or start it with a token")
        if scope["path"] in OPEN or scope["path"].startswith(OPEN_PREFIX):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer"
        if known and hmac.compare_digest(given.strip().encode("utf-8"), self._token):
            return None
        message = "this server needs its token" if not given else "the token is not this server's"
        remedy = "send the header `Authorization: Bearer <token>`"
        return ApiError(401, "token", message, remedy, {"WWW-Authenticate": "Bearer"})


class Limits:
    """Bounds requests inside, the bytes of one, those of all, and the time until one is there.

    Bytes are counted as they arrive, whatever Content-Length says.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._pending = self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse a request."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path in LIGHT or path.startswith(OPEN_PREFIX):
            await self._app(scope, receive, send)
            return
        settings = self._settings
        declared = Headers(raw=scope["headers"]).get("content-length", "")
        if self._pending >= settings.max_pending:
            await response_of(busy(f"{self._pending} requests are inside"))(scope, receive, send)
        elif declared.isdigit() and int(declared) > settings.max_body_bytes:
            await response_of(self._beyond())(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    def _beyond(self) -> ApiError:
        limit = self._settings.max_body_bytes
        return too_large(f"a body has at most {limit} bytes", "send it in several requests")

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, self)
        self._pending += 1
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._pending -= 1
            self._bytes -= body.count

    def count(self, body: _Body, more: int) -> None:
        """Take in bytes of a body.

        Raises:
            ApiError: beyond a limit.
        """
        body.count += more
        self._bytes += more
        if body.count > self._settings.max_body_bytes:
            raise self._beyond()
        if self._bytes > self._settings.max_inflight_bytes:
            raise busy("the requests inside have as many bytes as this server takes at once")

    @property
    def timeout_s(self) -> int:
        """Seconds until a body must have arrived."""
        return self._settings.body_timeout_s


class _Body:
    """Counts and times what a request brings."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._complete = False
        self._deadline = asyncio.get_running_loop().time() + limits.timeout_s
        self.count = 0

    async def receive(self) -> Message:
        """Return the next message, or raise what it is refused for."""
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body did not arrive in time") from None
        self._complete = not message.get("more_body", False)
        self._limits.count(self, len(message.get("body", b"")))
        return message
