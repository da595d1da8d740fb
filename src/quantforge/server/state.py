"""What the routes of one server share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import anyio
import anyio.to_thread
import numpy as np
import torch
from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from quantforge.errors import ConfigError
from quantforge.server.bodies import (
    JSON,
    Body,
    Tensors,
    as_float32,
    check_shape,
    matrix,
    open_tensors,
    receive,
    vectors_of,
)
from quantforge.server.catalog import Catalog
from quantforge.server.observe import CollectionMetrics, Metrics
from quantforge.server.schemas import Vectors
from quantforge.server.settings import Settings
from quantforge.server.work import Answer, Download, Job, Jobs, Operation, Progress, Scratch
from quantforge.vectordb.lock import WriterLock

T = TypeVar("T")


class Server:
    """Folders, threads, jobs, collections and counters of a server that runs.

    Args:
        settings: of the server.
        metrics: its counters.

    Raises:
        ConfigError: for a device that is not there.
        InputError: if another server uses the folder.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        _check_device(settings.device)
        settings.folder.mkdir(parents=True, exist_ok=True)
        self._lock = WriterLock(settings.folder / "server.lock")
        self.scratch = Scratch(settings.folder / "scratch")
        self.jobs = Jobs(settings.max_jobs)
        self.catalog = Catalog(settings.folder / "collections", self.scratch.path, settings)
        self._threads = anyio.CapacityLimiter(settings.workers)
        self._sizes = CollectionMetrics(lambda: [c.sizes for c in self.catalog.opened()])
        metrics.registry.register(self._sizes)

    async def run(self, work: Callable[[], T]) -> T:
        """Do work in a thread, when one of the workers is free."""
        return await anyio.to_thread.run_sync(work, limiter=self._threads)

    async def with_body(
        self, request: Request, allowed: tuple[str, ...], use: Callable[[Body], T]
    ) -> T:
        """Take in a body and use it in a thread; its file is gone afterwards."""
        folder = self.scratch.folder()
        try:
            body = await receive(request, folder, self.settings, allowed)
            return await self.run(partial(use, body))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def operate(
        self,
        request: Request,
        kind: str,
        allowed: tuple[str, ...],
        prepare: Callable[[Body, Path], tuple[Operation, int]],
        background: bool | None,
    ) -> Response:
        """Run an operation on a body, or make it a job if it is long or should be one.

        Args:
            request: with the body.
            kind: what jobs of it are called.
            allowed: media types.
            prepare: looks at the body, and returns the operation and how many numbers it takes;
                results may be written to the folder.
            background: whether it is a job; None: if it is long.
        """
        folder = self.scratch.folder()
        job: Job | None = None
        try:
            body = await receive(request, folder, self.settings, allowed)

            def work() -> Job | Answer:
                operation, numbers = prepare(body, folder)
                if numbers > self.settings.job_numbers if background is None else background:
                    return self.jobs.start(kind, operation, folder)
                return operation(Progress())

            found = await self.run(work)
            if not isinstance(found, Job):
                return answer_of(found)
            job = found
            headers = {"Location": f"/v1/jobs/{job.id}"}
            return JSONResponse(job.info().model_dump(), 202, headers)
        finally:
            if job is None:  # else the folder is the job's
                shutil.rmtree(folder, ignore_errors=True)

    def tensors(self, body: Body) -> Tensors:
        """Return the arrays of a body: those of a file, or the `vectors` of JSON."""
        if body.media_type != JSON:
            return open_tensors(body, self.settings)
        array = matrix(body.parse(Vectors).vectors, "vectors")
        check_shape("vectors", array.shape, self.settings)
        return Tensors({"vectors": array})

    def vectors(self, body: Body) -> np.ndarray:
        """Return the one array of vectors of a body, (n, dim) float32."""
        return as_float32("vectors", vectors_of(self.tensors(body)))

    def close(self) -> None:
        """Cancel jobs, close collections, and leave the folder to another server."""
        self.jobs.close()
        self.catalog.close()
        self.scratch.close()
        self.metrics.registry.unregister(self._sizes)
        self._lock.release()


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used: {reason}; use cpu") from error


def answer_of(answer: Answer) -> Response:
    """Return a result as HTTP has it."""
    if not isinstance(answer, Download):
        return JSONResponse(answer)
    size, stream = answer.stream()
    headers = {"Content-Length": str(size)}
    return StreamingResponse(stream, media_type=answer.media_type, headers=headers)


async def _server_of(request: Request) -> Server:  # another def would be run in a thread
    return request.app.state.server


Running = Annotated[Server, Depends(_server_of)]
"""A route's argument: the server that it belongs to."""
