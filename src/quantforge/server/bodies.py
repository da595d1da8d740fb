"""Tensors in and out of requests: safetensors, .npy, and JSON for a few vectors.

Bodies go to files as they arrive, so a request costs no memory until it is worked on; arrays are
memory-mapped from there. What a header promises is checked against the limits before any array is
touched.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from fastapi import Request
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from starlette.requests import ClientDisconnect

from quantforge.arrays import open_npy
from quantforge.errors import FormatError, InputError
from quantforge.io import open_file
from quantforge.io.header import DTYPE_CODES, DTYPES, MARKER
from quantforge.server.errors import ApiError, first_problem, too_large
from quantforge.server.settings import Settings
from quantforge.tensor import QuantTensor

SAFETENSORS = "application/vnd.safetensors"
NPY = "application/x-npy"
JSON = "application/json"
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 1024

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Body:
    """A request's body: a file of tensors, or JSON text.

    Attributes:
        media_type: one of SAFETENSORS, NPY, JSON.
        path: of the file, for the first two.
        text: JSON.
    """

    media_type: str
    path: Path
    text: bytes = b""

    def parse(self, model: type[Model]) -> Model:
        """Return JSON as a model.

        Raises:
            ApiError: if it is none.
        """
        try:
            return model.model_validate_json(self.text)
        except ValidationError as error:
            raise first_problem(error) from error


@dataclass(frozen=True)
class Tensors:
    """What a body holds: named arrays, and the strings of a safetensors header."""

    values: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def numbers(self) -> int:
        """Numbers in all of them, decoded."""
        return sum(prod(value.shape) for value in self.values.values())


def media_type(request: Request, allowed: tuple[str, ...]) -> str:
    """Return what a request says that its body is.

    Raises:
        ApiError: if it is not one of those allowed.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in allowed:
        message = f"Content-Type must be one of {', '.join(allowed)}; got {given or 'nothing'!r}"
        raise ApiError(415, "media_type", message, f"name it: -H 'Content-Type: {allowed[0]}'")
    return given


async def receive(
    request: Request, folder: Path, settings: Settings, allowed: tuple[str, ...]
) -> Body:
    """Take in a body.

    Raises:
        ApiError: for another media type or too many bytes.
    """
    kind, path = media_type(request, allowed), folder / "body"
    if kind != JSON:
        with open(path, "wb") as file:
            async for piece in _pieces(request):
                file.write(piece)
        return Body(kind, path)
    text = bytearray()
    async for piece in _pieces(request):
        text += piece
        if len(text) > settings.max_json_bytes:
            raise too_large(
                f"JSON has at most {settings.max_json_bytes} bytes",
                f"send {SAFETENSORS} or {NPY}: a quarter of the bytes, and 50 times as fast",
            )
    return Body(kind, path, bytes(text))


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    try:
        async for piece in request.stream():
            yield piece
    except ClientDisconnect:
        raise ApiError(400, "input", "the connection ended before the body did") from None


def matrix(rows: list[list[float]], what: str) -> np.ndarray:
    """Return rows of numbers as (n, dim) float32.

    Raises:
        InputError: for rows of different lengths, or numbers beyond float32.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise InputError(
            f"{what} must be rows of one length; got {min(lengths)} and {max(lengths)}"
        )
    with np.errstate(over="ignore"):  # an infinity is refused by those who use it
        return np.array(rows, np.float32).reshape(len(rows), lengths.pop() if lengths else 0)


def open_tensors(body: Body, settings: Settings) -> Tensors:
    """Return the arrays of a binary body, memory-mapped, within the limits.

    Raises:
        FormatError: for a damaged file.
        ApiError: for arrays beyond the limits.
    """
    if body.media_type == NPY:
        found = Tensors({"vectors": _open_npy(body.path)})
    else:
        found = _open_safetensors(body.path, settings)
    for name, value in found.values.items():
        check_shape(name, tuple(value.shape), settings)
    if found.numbers > settings.max_numbers:
        raise _too_many("all tensors together", found.numbers, settings)
    return found


def check_shape(name: str, shape: tuple[int, ...], settings: Settings) -> None:
    """Raise `ApiError` for an array beyond the limits; axes of no length count as one."""
    count = prod(max(1, size) for size in shape)
    if count > settings.max_numbers:
        raise _too_many(name, count, settings)
    if shape and shape[-1] > settings.max_dim:
        raise too_large(
            f"vectors have at most {settings.max_dim} numbers; {name} has {shape[-1]}",
            "vectors lie along the last axis: transpose",
        )


def _too_many(name: str, count: int, settings: Settings) -> ApiError:
    message = f"a request holds at most {settings.max_numbers} numbers, decoded; {name}: {count}"
    return too_large(message, "send them in several requests")


def _open_npy(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:
        raise FormatError("the body is empty; expected a .npy file")
    try:
        with np.errstate(over="ignore"):  # sizes that a header lies about
            return open_npy(path)
    except FormatError as error:
        raise FormatError(str(error).replace(str(path), "the body")) from error


def _open_safetensors(path: Path, settings: Settings) -> Tensors:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > path.stat().st_size:
        raise FormatError("the body is not a readable safetensors file: its header is cut short")
    if length > MAX_HEADER_BYTES:
        raise too_large(f"a header has at most {MAX_HEADER_BYTES} bytes; got {length}",
                        "send fewer tensors at once")  # fmt: skip
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if len(names) > MAX_TENSORS:
                raise too_large(f"at most {MAX_TENSORS} tensors; got {len(names)}",
                                "send fewer at once")  # fmt: skip
            if MARKER not in metadata:
                values = {name: file.get_tensor(name) for name in names}
                for name, value in values.items():
                    if value.dtype not in DTYPE_CODES:
                        raise FormatError(
                            f"array {name!r} has the unsupported dtype {value.dtype}; known are "
                            f"{', '.join(DTYPES)}"
                        )
                return Tensors(values, metadata)
    except (SafetensorError, RuntimeError, OverflowError, AttributeError) as error:
        # the last three: torch has no such tensor
        raise FormatError(f"the body is not a readable safetensors file: {error}") from error
    try:
        with open_file(path) as file:
            for name in file:  # before a tensor is made of it
                check_shape(name, file.info(name).shape, settings)
            return Tensors(dict(file), file.metadata)
    except FormatError as error:
        raise FormatError(str(error).replace(str(path), "the body")) from error


def vectors_of(tensors: Tensors) -> Any:
    """Return the one array of vectors (n, dim) of a body.

    Raises:
        InputError: if there is no such array, or several.
    """
    values = tensors.values
    if "vectors" not in values and len(values) != 1:
        raise InputError(f"name the tensor 'vectors', or send one alone; got {sorted(values)}")
    found = values["vectors"] if "vectors" in values else next(iter(values.values()))
    if len(found.shape) != 2:
        raise InputError(f"vectors must have shape (n, dim); got {tuple(found.shape)}")
    return found


def as_float32(name: str, value: Any) -> np.ndarray:
    """Return an array of numbers as float32, for an index.

    Raises:
        InputError: for packed or non-floating tensors.
    """
    if isinstance(value, QuantTensor):
        raise InputError(f"{name} is packed already; decompress it first")
    if isinstance(value, torch.Tensor):
        if not value.dtype.is_floating_point:
            raise InputError(f"{name} must hold floating-point numbers; got {value.dtype}")
        return value.float().numpy()
    if value.dtype.kind != "f":
        raise InputError(f"{name} must hold floating-point numbers; got {value.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):  # users refuse what is not finite
        return np.array(value, np.float32)  # a copy: torch wants memory that can be written to


def parse_header_json(metadata: Mapping[str, str], name: str) -> Any:
    """Return a JSON entry of a safetensors header, or None.

    Raises:
        InputError: if it is not JSON.
    """
    if name not in metadata:
        return None
    try:
        return json.loads(metadata[name])
    except (ValueError, RecursionError) as error:
        raise InputError(f"header entry {name!r} is not JSON: {error}") from error


def content(model: type[BaseModel] | None, *media_types: str) -> dict[str, Any]:
    """Return the OpenAPI description of a body."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    found = dict.fromkeys(media_types, binary)
    if model is not None:
        found[JSON] = {"schema": model.model_json_schema()}
    return {"requestBody": {"required": True, "content": found}}
