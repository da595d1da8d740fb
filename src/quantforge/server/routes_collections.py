"""Routes: collections, their points, and search in them."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response

from quantforge.server.bodies import (
    JSON,
    NPY,
    SAFETENSORS,
    Body,
    as_float32,
    check_shape,
    content,
    matrix,
    parse_header_json,
    vectors_of,
)
from quantforge.server.errors import ApiError, too_large
from quantforge.server.links import AFTER_COLLECTION, AFTER_LIST, AFTER_POINTS
from quantforge.server.links import COLLECTION as HERE
from quantforge.server.schemas import (
    NAME_PATTERN,
    Added,
    CollectionInfo,
    CollectionList,
    CollectionSettings,
    Found,
    Page,
    PointIds,
    Points,
    Removed,
    Search,
    Vectors,
)
from quantforge.server.state import Running, Server

router = APIRouter()

Name = Annotated[str, Path(pattern=NAME_PATTERN)]
ANY = (JSON, SAFETENSORS, NPY)


@router.get("/v1/collections", responses={200: {"links": AFTER_LIST}})
async def list_collections(server: Running) -> CollectionList:
    """List collections with their sizes."""

    def look() -> CollectionList:
        found, damaged = [], {}
        for name in server.catalog.names():
            try:
                found.append(server.catalog.get(name).info())
            except ApiError as error:
                if error.status_code != 404:  # deleted meanwhile
                    damaged[name] = error.detail
        return CollectionList(collections=found, damaged=damaged)

    return await server.run(look)


@router.put(
    HERE,
    responses={
        200: {"links": AFTER_COLLECTION},
        201: {"model": CollectionInfo, "description": "Made", "links": AFTER_COLLECTION},
    },
)
async def put_collection(
    name: Name, body: CollectionSettings, server: Running, response: Response
) -> CollectionInfo:
    """Make a collection; one that is there with the same settings stays as it is."""
    if body.dim > server.settings.max_dense_dim:
        limit = server.settings.max_dense_dim
        raise too_large(f"vectors of a collection have at most {limit} numbers; got {body.dim}",
                        "shorten them, for instance by PCA")  # fmt: skip
    collection, new = await server.run(lambda: server.catalog.create(name, body))
    response.status_code = 201 if new else 200
    return await server.run(collection.info)


@router.get(HERE)
async def get_collection(name: Name, server: Running) -> CollectionInfo:
    """Tell what a collection holds and takes."""
    return await server.run(lambda: server.catalog.get(name).info())


@router.delete(HERE, status_code=204)
async def delete_collection(name: Name, server: Running) -> None:
    """Delete a collection with its files."""
    await server.run(lambda: server.catalog.delete(name))


@router.post(
    HERE + "/points",
    openapi_extra=content(Points, SAFETENSORS, NPY),
    responses={200: {"links": AFTER_POINTS}},
)
async def post_points(name: Name, request: Request, server: Running) -> Added:
    """Add vectors; they are on the disk when this is answered.

    A safetensors body holds `vectors`, and may hold `ids` (int64, or JSON in a header entry of
    that name) and JSON in the header entry `metadata`.
    """

    def add(body: Body) -> Added:
        collection = server.catalog.get(name)
        points = _points(body, server)
        return Added(ids=collection.add(*points))

    return await server.with_body(request, ANY, add)


@router.put(HERE + "/points", openapi_extra=content(Points, SAFETENSORS, NPY))
async def put_points(name: Name, request: Request, server: Running) -> Added:
    """Replace the vectors of points by id, all of them or none; what is sent is as for adding."""

    def update(body: Body) -> Added:
        collection = server.catalog.get(name)
        vectors, ids, metadata = _points(body, server)
        if ids is None:
            raise ApiError(422, "schema", "ids must name the points to replace", "send ids")
        return Added(ids=collection.update(vectors, ids, metadata))

    return await server.with_body(request, ANY, update)


@router.get(HERE + "/points")
async def get_points(
    name: Name,
    server: Running,
    offset: Annotated[int, Query(ge=0, le=2**62)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page:
    """List ids in the order of rows."""

    def look() -> Page:
        total, ids = server.catalog.get(name).page(offset, limit)
        return Page(total=total, ids=ids)

    return await server.run(look)


@router.post(HERE + "/train", status_code=204, openapi_extra=content(Vectors, SAFETENSORS, NPY))
async def train(name: Name, request: Request, server: Running) -> None:
    """Learn from a sample what the modes "adapted" and "centred" know of the data.

    Otherwise they learn from the first points, which should then be some thousands.
    """

    def learn(body: Body) -> None:
        collection = server.catalog.get(name)
        collection.train(server.vectors(body))

    await server.with_body(request, ANY, learn)


@router.delete(HERE + "/points")
async def delete_points(name: Name, body: PointIds, server: Running) -> Removed:
    """Remove points by id, all of them or none."""
    removed = await server.run(lambda: server.catalog.get(name).remove(list(body.ids)))
    return Removed(removed=removed)


@router.post(HERE + "/compact", status_code=204)
async def compact(name: Name, server: Running) -> None:
    """Write all changes so far into new files, which open faster."""
    await server.run(lambda: server.catalog.get(name).compact())


@router.post(
    HERE + "/search",
    openapi_extra=content(Search, SAFETENSORS, NPY),
    response_model_exclude_none=True,
)
async def search(
    name: Name,
    request: Request,
    server: Running,
    k: Annotated[int, Query(ge=1, description="for bodies that are not JSON")] = 10,
    nprobe: Annotated[int | None, Query(ge=1)] = None,
    recall: Annotated[float | None, Query(gt=0, le=1)] = None,
) -> Found:
    """Find the nearest points of vectors, or of points that are there.

    A safetensors body holds `vectors`, the queries.
    """

    def look(body: Body) -> Found:
        collection = server.catalog.get(name)
        if body.media_type == JSON:
            asked = body.parse(Search)
        else:
            asked = Search(k=k, nprobe=nprobe, recall=recall)
        return collection.search(_queries(body, asked, server), asked)

    return await server.with_body(request, ANY, look)


def _points(body: Body, server: Server) -> tuple[np.ndarray, Any, Any]:
    """Return vectors, ids and metadata of a body."""
    if body.media_type == JSON:
        points = body.parse(Points)
        vectors = matrix(points.vectors, "vectors")
        check_shape("vectors", vectors.shape, server.settings)
        return vectors, points.ids, points.metadata
    tensors = server.tensors(body)
    vectors = as_float32("vectors", vectors_of(tensors))
    ids = tensors.values.get("ids")
    if ids is None:
        ids = parse_header_json(tensors.metadata, "ids")
    return vectors, ids, parse_header_json(tensors.metadata, "metadata")


def _queries(body: Body, asked: Search, server: Server) -> np.ndarray | None:
    """Return the vectors to look for, or None where points are named."""
    if body.media_type != JSON:
        return server.vectors(body)
    if (asked.queries is None) == (asked.like is None):
        raise ApiError(422, "schema", "give either queries or like", "like names points by id")
    return None if asked.queries is None else matrix(asked.queries, "queries")
