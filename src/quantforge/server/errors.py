"""What a request that fails is answered: one JSON shape, whatever went wrong.

{"error": {"type": "input", "message": "...", "remedy": "..."}}
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute

from quantforge.errors import FormatError, QuantForgeError, UnsupportedError

RETRY_AFTER_S = 1


class ApiError(HTTPException):
    """A request that is refused.

    An `HTTPException`, so that it passes through FastAPI's reading of bodies as it is.

    Args:
        status: HTTP status.
        type: one word for programs: see TYPES.
        message: what, expected, got.
        remedy: what to do instead.
    """

    def __init__(
        self,
        status: int,
        type: str,
        message: str,
        remedy: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.type, self.remedy = type, remedy


class ErrorDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str
    remedy: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


TYPES = {
    400: "input",
    401: "token",
    403: "host",
    404: "not_found",
    405: "method",
    408: "timeout",
    409: "conflict",
    413: "too_large",
    415: "media_type",
    422: "schema",
    429: "busy",
    500: "internal",
    503: "memory",
    507: "disk_full",
}


def busy(message: str) -> ApiError:
    """Return the error of a server that has enough to do."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(429, "busy", message, f"try again after {RETRY_AFTER_S} s", headers)


def too_large(message: str, remedy: str) -> ApiError:
    """Return the error of a request beyond a limit."""
    return ApiError(413, "too_large", message, remedy)


def response_of(error: HTTPException) -> JSONResponse:
    """Return the answer to a refused request."""
    kind = error.type if isinstance(error, ApiError) else TYPES.get(error.status_code, "http")
    detail = ErrorDetail(type=kind, message=str(error.detail))
    if isinstance(error, ApiError):
        detail.remedy = error.remedy
    body = {"error": detail.model_dump(exclude_none=True)}
    return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))


def first_problem(error: ValidationError | RequestValidationError) -> ApiError:
    """Return the first thing that a schema does not allow, by its place."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "body"
    return ApiError(422, "schema", f"{where}: {first['msg']}", "see /openapi.json")


def api_error(error: Exception) -> ApiError:
    """Return what a failure inside of the library means for the request."""
    if isinstance(error, FormatError):
        return ApiError(400, "format", str(error))
    if isinstance(error, UnsupportedError):
        return ApiError(400, "unsupported", str(error))
    if isinstance(error, QuantForgeError):
        return ApiError(400, "input", str(error))
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return ApiError(503, "memory", "there is not enough memory for this", "send less at once")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ApiError(507, "disk_full", "the server's disk is full; nothing was changed")
    return ApiError(500, "internal", "the server failed; its log says why")


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Answer all failures of an app in the one shape.

    Args:
        app: the application.
        routes: of it, to say what a path allows.
    """
    known = [route for route in routes if isinstance(route, APIRoute)]

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:  # Starlette names the methods of the first such route alone
            here = [route for route in known if route.path_regex.match(request.url.path)]
            allowed = sorted({method for route in here for method in route.methods or ()})
            error.headers = {"Allow": ", ".join(allowed)}
        return response_of(error)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return response_of(first_problem(error))

    async def failed(_: Request, error: Exception) -> JSONResponse:
        return response_of(api_error(error))

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    for kind in (QuantForgeError, MemoryError, torch.OutOfMemoryError, OSError, Exception):
        app.add_exception_handler(kind, failed)
