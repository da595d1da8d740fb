"""The OpenAPI document says what the server does; schemathesis checks more (openapi_hooks.py)."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from quantforge.server import routes_collections, routes_system, routes_work
from quantforge.server.links import AFTER_COLLECTION, AFTER_JOB, AFTER_LIST, AFTER_POINTS
from tests.helpers import gaussian
from tests.server.conftest import Serve
from tests.server.test_tensors import JSON, NPY, SAFETENSORS, npy

TOKEN = "a-token-of-some-length"
OPEN = {"/health", "/ready"}


@pytest.fixture(scope="module")
def document(shared_client: TestClient) -> dict[str, Any]:
    return shared_client.get("/openapi.json").json()


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_route_is_described(document: dict[str, Any]) -> None:
    described = {(path, method.upper()) for path, method, _ in operations(document)}
    routers = (routes_system.for_all, routes_system.router, routes_work.router,
               routes_collections.router)  # fmt: skip
    served = {
        (route.path, method)
        for router in routers
        for route in router.routes
        for method in route.methods  # type: ignore[attr-defined]
    }
    hidden = {("/", "GET"), ("/static/{name}", "GET")}
    hidden |= {(f"/{name}", "POST") for name in ("compress", "decompress", "benchmark", "optimize")}
    assert described == served - hidden
    for path, method, operation in operations(document):
        assert operation.get("description") or operation.get("summary"), (path, method)
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)


def test_every_operation_says_how_it_refuses(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        responses = operation["responses"]
        assert {"4XX", "5XX"} <= set(responses), (path, method)
        assert "422" not in responses, "validation answers in the one shape"
        schema = responses["4XX"]["content"][JSON]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorBody"}


def test_bodies_name_their_media_types(document: dict[str, Any]) -> None:
    binary = {"type": "string", "format": "binary"}
    for path, kinds in {
        "/v1/compress": {SAFETENSORS, NPY, JSON},
        "/v1/decompress": {SAFETENSORS},
        "/v1/collections/{name}/points": {SAFETENSORS, NPY, JSON},
        "/v1/collections/{name}/search": {SAFETENSORS, NPY, JSON},
    }.items():
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert set(content) == kinds
        assert all(content[kind]["schema"] == binary for kind in kinds - {JSON})


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    prefix = "#/components/schemas/"
    for reference in references(document):
        assert reference.removeprefix(prefix) in document["components"]["schemas"], reference


def test_links_lead_to_operations_and_their_parameters(document: dict[str, Any]) -> None:
    described = {(path, method): operation for path, method, operation in operations(document)}
    names, seen = {"name", "id"}, 0
    for path, method, operation in operations(document):
        for status, response in operation["responses"].items():
            for name, link in response.get("links", {}).items():
                _, _, place, verb = link["operationRef"].split("/")
                target = described[place.replace("~1", "/"), verb]
                taken = {p["name"] for p in target["parameters"] if p["in"] == "path"}
                given = set(link["parameters"]) or names  # a new name is the caller's
                assert taken <= given <= names, (path, method, status, name)
                seen += 1
    expected = len(AFTER_LIST) + 2 * len(AFTER_COLLECTION) + len(AFTER_POINTS)
    assert seen == expected + 4 * len(AFTER_JOB)


def test_operations_that_need_the_token_say_so(serve: Serve) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    document = serve(token=TOKEN).get("/openapi.json", headers=headers).json()
    for path, method, operation in operations(document):
        assert ("security" in operation) == (path not in OPEN), (path, method)
    schemes = document["components"]["securitySchemes"]
    assert [scheme["scheme"] for scheme in schemes.values()] == ["bearer"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/v1/collections/a", "DELETE, GET, PUT"), ("/v1/jobs/1", "DELETE, GET"),
     ("/v1/collections/a/points", "DELETE, GET, POST, PUT"), ("/compress", "POST"),
     ("/health", "GET")],
)  # fmt: skip
def test_a_wrong_method_is_told_the_right_ones(client: TestClient, path: str, allowed: str) -> None:
    answer = client.request("PATCH", path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    assert answer.json()["error"]["type"] == "method"


def test_answers_are_what_the_document_says(client: TestClient, document: dict[str, Any]) -> None:
    """Fields of answers and of their schemas, for one answer each."""
    schemas = document["components"]["schemas"]
    client.put("/v1/collections/a", json={"dim": 64})
    points = {"vectors": gaussian(5, 64).tolist()}
    headers = {"Content-Type": NPY}
    job = client.post(
        "/compress", content=npy(gaussian(2, 64)), headers=headers, params={"background": True}
    )
    answers = {
        "Health": client.get("/health"),
        "Version": client.get("/version"),
        "Added": client.post("/v1/collections/a/points", json=points),
        "Page": client.get("/v1/collections/a/points"),
        "Found": client.post("/v1/collections/a/search", json={"like": [1]}),
        "CollectionInfo": client.get("/v1/collections/a"),
        "CollectionList": client.get("/v1/collections"),
        "BenchmarkReport": client.post("/benchmark", json=points, params={"bits": 4}),
        "JobInfo": job,
        "JobList": client.get("/v1/jobs"),
        "ErrorBody": client.get("/v1/jobs/none"),
    }
    for name, answer in answers.items():
        known = schemas[name]["properties"]
        assert set(schemas[name].get("required", [])) <= set(answer.json()) <= set(known), name
