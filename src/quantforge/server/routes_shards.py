"""Routes of a server that fronts a `ShardedIndex`: this process is rank 0, others hold shards too.

POST /v1/shards/search      the nearest in all shards; says which ranks did not answer in time
GET  /v1/shards             who holds what
POST /v1/shards/rebalance   spread the files that are there now, perhaps without some ranks
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field

from quantforge.server.bodies import JSON, NPY, SAFETENSORS, Body, content, matrix
from quantforge.server.catalog import check_results
from quantforge.server.errors import ApiError, busy
from quantforge.server.schemas import Found, Matrix, Sent, Strict
from quantforge.server.settings import Settings
from quantforge.server.state import Running
from quantforge.vectordb.sharded import OnFailure, RankError, ShardedIndex

router = APIRouter()

ANY = (JSON, SAFETENSORS, NPY)
MAX_SEARCH_S = 60.0
MAX_LOAD_S = 3600.0

SearchSeconds = Annotated[float, Field(gt=0, le=MAX_SEARCH_S)]


class ShardSearch(Sent):
    """What to look for in all shards."""

    queries: Matrix
    k: Annotated[int, Field(ge=1)] = 10
    where: dict[str, Any] | None = Field(
        default=None, description="what metadata of results must be"
    )
    nprobe: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="lists to look into, in each shard"
    )
    recall: Annotated[float, Field(gt=0, le=1)] | None = None
    timeout_s: SearchSeconds = Field(
        default=10.0,
        description="seconds for earlier searches and then for other ranks, once this one has "
        "found its own",
    )
    on_failure: Literal["error", "partial"] = Field(
        default="error", description="what to do without ranks: fail, or answer with the others"
    )


class ShardFound(Found):
    """Neighbours of each query, best first."""

    partial: bool = Field(description="whether ranks are missing")
    missing: dict[str, str] = Field(description="why, by rank")


class ShardsInfo(Strict):
    """What the ranks hold."""

    dim: int
    metric: str
    vectors: int = Field(description="of the ranks that answered when shards were last spread")
    ranks: dict[str, list[str]] = Field(description="files by rank")


class Rebalance(Sent):
    """How to spread the shards."""

    without: list[Annotated[int, Field(ge=1)]] = Field(
        default=[], description="ranks that get none, because they are gone"
    )
    timeout_s: Annotated[float, Field(gt=0, le=MAX_LOAD_S)] = Field(
        default=600.0, description="seconds until all ranks have loaded theirs"
    )


class Front:
    """A sharded index that the threads of a server ask one after the other."""

    def __init__(self, index: ShardedIndex, settings: Settings) -> None:
        self._index, self._settings = index, settings
        self._lock = threading.Lock()

    @contextmanager
    def _asking(self, timeout: float) -> Iterator[float]:
        """Yield the seconds that are left when it is this thread's turn.

        Raises:
            ApiError: if none are, or ranks are missing.
        """
        start = time.monotonic()
        if not self._lock.acquire(timeout=timeout):
            raise busy(f"earlier requests to the ranks took {timeout:g} s")
        try:
            yield max(timeout - (time.monotonic() - start), 0.0)
        except RankError as error:
            raise ApiError(
                503,
                "ranks",
                f"ranks have no answer: {error.missing}",
                'ask with on_failure = "partial", or spread the shards without them by '
                "POST /v1/shards/rebalance",
            ) from error
        finally:
            self._lock.release()

    def info(self) -> ShardsInfo:
        """Return what the ranks hold."""
        index = self._index
        ranks = {str(rank): names for rank, names in index.assignment.items()}
        return ShardsInfo(dim=index.dim, metric=index.metric, vectors=len(index), ranks=ranks)

    def search(self, queries: np.ndarray, asked: ShardSearch) -> ShardFound:
        """Return the nearest of each query.

        Raises:
            InputError: for what does not fit.
            ApiError: beyond the limits, or without ranks that are needed.
        """
        check_results(asked.k, len(queries), self._settings)
        if not len(queries):
            return ShardFound(ids=[], scores=[], partial=False, missing={})
        options = asked.model_dump(include={"where", "nprobe", "recall"})
        with self._asking(asked.timeout_s) as left:
            k = min(asked.k, len(self._index))
            result = self._index.search(
                queries, k, **options, timeout=left, on_failure=asked.on_failure
            )
        ids, scores = result
        there = np.isfinite(scores)
        return ShardFound(
            ids=[row[kept].tolist() for row, kept in zip(ids, there, strict=True)],
            scores=[row[kept].tolist() for row, kept in zip(scores, there, strict=True)],
            partial=bool(result.missing),
            missing={str(rank): why for rank, why in result.missing.items()},
        )

    def rebalance(self, asked: Rebalance) -> ShardsInfo:
        """Spread the shards and return who holds what.

        Raises:
            ApiError: if ranks could not load theirs.
        """
        with self._asking(asked.timeout_s) as left:
            self._index.rebalance(without=asked.without, timeout=left)
            return self.info()


async def _front_of(request: Request) -> Front:
    return request.app.state.front


Asked = Annotated[Front, Depends(_front_of)]


@router.get("/v1/shards")
async def get_shards(front: Asked, server: Running) -> ShardsInfo:
    """Tell which rank holds which files."""
    return await server.run(front.info)


@router.post(
    "/v1/shards/search",
    openapi_extra=content(ShardSearch, SAFETENSORS, NPY),
    response_model_exclude_none=True,
)
async def search_shards(
    request: Request,
    front: Asked,
    server: Running,
    k: Annotated[int, Query(ge=1, description="for bodies that are not JSON")] = 10,
    nprobe: Annotated[int | None, Query(ge=1)] = None,
    recall: Annotated[float | None, Query(gt=0, le=1)] = None,
    timeout_s: Annotated[float, Query(gt=0, le=MAX_SEARCH_S)] = 10.0,
    on_failure: OnFailure = "error",
) -> ShardFound:
    """Find the nearest vectors in the shards of all ranks.

    Ranks that do not answer in time make it fail with status 503, or be partial, as asked. A
    safetensors body holds `vectors`, the queries.
    """

    def look(body: Body) -> ShardFound:
        if body.media_type == JSON:
            asked = body.parse(ShardSearch)
            return front.search(matrix(asked.queries, "queries"), asked)
        asked = ShardSearch(
            queries=[], k=k, nprobe=nprobe, recall=recall, timeout_s=timeout_s,
            on_failure=on_failure,
        )  # fmt: skip
        return front.search(server.vectors(body), asked)

    return await server.with_body(request, ANY, look)


@router.post("/v1/shards/rebalance")
async def rebalance(body: Rebalance, front: Asked, server: Running) -> ShardsInfo:
    """Spread the files that are in the folder now over the ranks, moving few."""
    return await server.run(lambda: front.rebalance(body))
