"""Routes: compress, decompress, benchmark, optimize; and the jobs that long ones become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from quantforge.server.bodies import (
    JSON,
    NPY,
    SAFETENSORS,
    Body,
    content,
)
from quantforge.server.errors import ApiError, too_large
from quantforge.server.links import AFTER_JOB, JOB
from quantforge.server.measuring import benchmark, optimization
from quantforge.server.operations import DENSE, compress, decompress
from quantforge.server.schemas import (
    BenchmarkQuery,
    BenchmarkReport,
    CompressQuery,
    DecompressQuery,
    JobInfo,
    JobList,
    OptimizeQuery,
    Vectors,
)
from quantforge.server.state import Running, answer_of
from quantforge.server.work import Operation

router = APIRouter()

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
ANY = (SAFETENSORS, NPY, JSON)
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
AS_JOB: dict[int | str, dict[str, Any]] = {
    202: {
        "model": JobInfo,
        "description": "A job; its Location tells how far it is",
        "links": AFTER_JOB,
    }
}


def both(path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
    """Register a POST route under /v1, and under its bare name, which the document leaves out."""

    def register(endpoint: Endpoint) -> Endpoint:
        router.post(f"/v1{path}", **options)(endpoint)
        router.post(path, include_in_schema=False, **options)(endpoint)
        return endpoint

    return register


@both(
    "/compress",
    openapi_extra=content(Vectors, SAFETENSORS, NPY),
    response_class=Response,
    responses={200: {"content": {SAFETENSORS: BINARY}}, **AS_JOB},
)
async def post_compress(
    request: Request, query: Annotated[CompressQuery, Query()], server: Running
) -> Response:
    """Pack vectors into 1-8 bits a number.

    The body holds vectors along the last axis; of a safetensors file, floating-point tensors of
    two axes and more are packed. The answer is a safetensors file that `quantforge.load_file`
    reads.
    """
    settings = server.settings

    def prepare(body: Body, folder: Path) -> tuple[Operation, int]:
        tensors = server.tensors(body)
        config = query.config(query.bits)
        run = compress(tensors, config, folder, settings.device, settings.max_dense_dim)
        return run, tensors.numbers

    return await server.operate(request, "compress", ANY, prepare, query.background)


@both(
    "/decompress",
    openapi_extra=content(None, SAFETENSORS),
    response_class=Response,
    responses={200: {"content": {SAFETENSORS: BINARY, NPY: BINARY, JSON: {}}}, **AS_JOB},
)
async def post_decompress(
    request: Request, query: Annotated[DecompressQuery, Query()], server: Running
) -> Response:
    """Decode what /compress answered, or any file of `quantforge.save_file`."""
    settings = server.settings

    def prepare(body: Body, folder: Path) -> tuple[Operation, int]:
        tensors = server.tensors(body)
        run = decompress(tensors, query.format, folder, settings.device, settings.max_dense_dim)
        return run, tensors.numbers

    return await server.operate(request, "decompress", (SAFETENSORS,), prepare, query.background)


@both(
    "/benchmark",
    openapi_extra=content(Vectors, SAFETENSORS, NPY),
    response_class=Response,
    responses={200: {"model": BenchmarkReport}, **AS_JOB},
)
async def post_benchmark(
    request: Request, query: Annotated[BenchmarkQuery, Query()], server: Running
) -> Response:
    """Measure error, recall, bytes and speed at several widths on the vectors sent."""
    settings = server.settings

    def prepare(body: Body, _: Path) -> tuple[Operation, int]:
        x = server.vectors(body)
        configs = [query.config(bits) for bits in dict.fromkeys(query.bits)]
        for config in configs:
            DENSE.admit(config.spec(x.shape[1]), settings.max_dense_dim)
        return benchmark(x, configs, settings.device), x.size * len(configs)

    return await server.operate(request, "benchmark", ANY, prepare, query.background)


@both(
    "/optimize",
    openapi_extra=content(Vectors, SAFETENSORS, NPY),
    response_class=Response,
    responses={200: {"content": {JSON: {"schema": {"type": "object"}}}}, **AS_JOB},
)
async def post_optimize(
    request: Request, query: Annotated[OptimizeQuery, Query()], server: Running
) -> Response:
    """Find the settings that fit the vectors sent best, by measuring them.

    The answer is what `quantforge.optimizer.optimize(...).to_dict()` returns.
    """
    settings = server.settings

    def prepare(body: Body, _: Path) -> tuple[Operation, int]:
        x = server.vectors(body)
        if x.shape[1] > settings.max_dense_dim:
            raise too_large(f"at most dim {settings.max_dense_dim}; got {x.shape[1]}", "send fewer")
        options = query.model_dump(exclude={"background"})
        return optimization(x, options, settings.device)

    return await server.operate(request, "optimize", ANY, prepare, query.background)


@router.get("/v1/jobs")
async def get_jobs(server: Running) -> JobList:
    """List jobs, oldest first."""
    return JobList(jobs=[job.info() for job in server.jobs.all()])


@router.get(JOB)
async def get_job(id: str, server: Running) -> JobInfo:
    """Tell how far a job is."""
    return server.jobs.get(id).info()


@router.get(
    f"{JOB}/result",
    response_class=Response,
    responses={200: {"content": {JSON: {}, SAFETENSORS: BINARY, NPY: BINARY}}},
)
async def get_result(id: str, server: Running) -> Response:
    """Return what the request would have been answered, had it not become a job."""
    job = server.jobs.get(id)
    if job.error is not None:
        raise job.error
    if job.answer is None:
        message = f"the job {id!r} is {job.state}"
        raise ApiError(409, "conflict", message, "ask again when its state is done")
    return answer_of(job.answer)


@router.delete(
    JOB, responses={202: {"model": JobInfo, "description": "Cancelled; it stays in the list"}}
)
async def delete_job(id: str, server: Running, response: Response) -> JobInfo:
    """Cancel a job, which stays until it is deleted once more, or forget one that has ended."""
    job = server.jobs.cancel(id)
    is_kept = any(other is job for other in server.jobs.all())
    response.status_code = 202 if is_kept else 200
    return job.info()
