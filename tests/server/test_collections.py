"""Collections over HTTP: made, filled, searched, emptied, and there again after a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save

from quantforge.vectordb import IndexConfig, QuantizedIndex
from tests.helpers import gaussian
from tests.server.conftest import Serve
from tests.server.test_tensors import NPY, error_of, npy, post

POINTS = "/v1/collections/a/points"
SEARCH = "/v1/collections/a/search"
DIM = 64


@pytest.fixture
def filled(client: TestClient) -> TestClient:
    """Start a server with 100 points in the collection "a"."""
    assert client.put("/v1/collections/a", json={"dim": DIM}).status_code == 201
    assert post(client, POINTS, npy(gaussian(100, DIM)), NPY).json()["ids"] == list(range(100))
    return client


def reference() -> QuantizedIndex:
    index = QuantizedIndex(DIM, IndexConfig(mode="oblivious", metric="cosine"))
    index.add(gaussian(100, DIM))
    return index


def test_search_finds_what_the_index_finds(filled: TestClient) -> None:
    queries = gaussian(3, DIM, seed=1)
    ids, scores = reference().search(queries, 5)
    expected = {"ids": ids.tolist(), "scores": pytest.approx(scores, rel=1e-5)}
    asked = [
        filled.post(SEARCH, json={"queries": queries.tolist(), "k": 5}),
        post(filled, SEARCH, npy(queries), NPY, k=5),
        post(filled, SEARCH, save({"vectors": torch.from_numpy(queries)}), k=5),
    ]
    for answer in asked:
        assert answer.status_code == 200, answer.text
        assert answer.json()["ids"] == expected["ids"]
        assert np.array(answer.json()["scores"]) == expected["scores"]


def test_points_that_are_there_can_be_queries(filled: TestClient) -> None:
    found = filled.post(SEARCH, json={"like": [7, 31], "k": 3}).json()["ids"]
    assert [ids[0] for ids in found] == [7, 31]
    assert [len(ids) for ids in found] == [3, 3]


def test_a_filter_and_a_k_beyond_what_is_there(filled: TestClient) -> None:
    found = filled.post(SEARCH, json={"like": [7], "k": 50, "ids": [3, 7, 9]}).json()
    assert sorted(found["ids"][0]) == [3, 7, 9]
    assert len(found["scores"][0]) == 3
    assert len(filled.post(SEARCH, json={"like": [7], "k": 1000}).json()["ids"][0]) == 100


def test_originals_order_candidates(client: TestClient) -> None:
    settings = {"dim": DIM, "bits": 1, "originals": "float16", "metric": "ip"}
    client.put("/v1/collections/a", json=settings)
    x, queries = gaussian(300, DIM), gaussian(5, DIM, seed=1)
    post(client, POINTS, npy(x), NPY)
    asked = {"queries": queries.tolist(), "k": 5, "rerank": 300}
    found = client.post(SEARCH, json=asked).json()["ids"]
    assert found == np.argsort(-(queries @ x.astype(np.float16).astype("f4").T))[:, :5].tolist()


def test_an_empty_collection_finds_nothing(client: TestClient) -> None:
    client.put("/v1/collections/a", json={"dim": DIM})
    answer = client.post(SEARCH, json={"queries": gaussian(2, DIM).tolist()})
    assert answer.json() == {"ids": [[], []], "scores": [[], []]}


def test_points_come_and_go(filled: TestClient) -> None:
    body = {"vectors": gaussian(2, DIM, seed=2).tolist(), "ids": [1000, 5000]}
    assert filled.post(POINTS, json=body).json() == {"ids": [1000, 5000]}
    answer = filled.post(POINTS, json=body)
    assert answer.status_code == 400
    assert "1000" in error_of(answer)["message"]
    gone = filled.request("DELETE", POINTS, json={"ids": [0, 1000]})
    assert gone.json() == {"removed": 2}
    answer = filled.request("DELETE", POINTS, json={"ids": [1, 1000]})
    assert answer.status_code == 400
    assert "1000" in error_of(answer)["message"]
    page = filled.get(POINTS, params={"offset": 98, "limit": 5}).json()
    assert page == {"total": 100, "ids": [99, 5000]}


def test_points_are_replaced(filled: TestClient) -> None:
    other = gaussian(2, DIM, seed=9)
    body = {"vectors": other.tolist(), "ids": [3, 4]}
    assert filled.put(POINTS, json=body).json() == {"ids": [3, 4]}
    found = filled.post(SEARCH, json={"queries": other.tolist(), "k": 1}).json()["ids"]
    assert found == [[3], [4]]
    for ids, status in (([3, 999], 400), (None, 422)):
        assert filled.put(POINTS, json={**body, "ids": ids}).status_code == status
    assert filled.get("/v1/collections/a").json()["vectors"] == 100


def test_metadata_is_kept_filtered_and_returned(client: TestClient) -> None:
    client.put("/v1/collections/a", json={"dim": DIM})
    x = gaussian(4, DIM)
    columns = {"lang": ["en", "de", "en", None], "year": [2020, 2021, 2022, 2023]}
    body = {"vectors": x[:2].tolist(), "metadata": {k: v[:2] for k, v in columns.items()}}
    assert client.post(POINTS, json=body).status_code == 200
    header = {"metadata": json.dumps({k: v[2:] for k, v in columns.items()})}
    answer = post(client, POINTS, save({"vectors": torch.from_numpy(x[2:])}, header))
    assert answer.json() == {"ids": [2, 3]}
    asked = {"queries": x[:1].tolist(), "metadata": True}
    for where, expected in (
        ({"lang": "en"}, {0, 2}),
        ({"year": {"gte": 2021}, "lang": {"in": ["de", "fr"]}}, {1}),
        ({"or": [{"lang": None}, {"year": 2020}]}, {0, 3}),
    ):
        found = client.post(SEARCH, json={**asked, "where": where}).json()
        assert set(found["ids"][0]) == expected
        for id, metadata in zip(found["ids"][0], found["metadata"][0], strict=True):
            assert metadata["year"] == columns["year"][id]
    assert "metadata" not in client.post(SEARCH, json={"like": [1]}).json()
    answer = client.post(SEARCH, json={**asked, "where": {"nothing": 3}})
    assert answer.status_code == 400
    assert "nothing" in error_of(answer)["message"]
    bad = {"vectors": x[:1].tolist(), "metadata": {"lang": ["en", "de"]}}
    assert client.post(POINTS, json=bad).status_code == 400
    assert client.get("/v1/collections/a").json()["vectors"] == 4


def test_ids_may_be_words(client: TestClient) -> None:
    client.put("/v1/collections/a", json={"dim": DIM})
    x = gaussian(3, DIM)
    body = {"vectors": x.tolist(), "ids": ["one", "zwei", "三"]}
    assert client.post(POINTS, json=body).json() == {"ids": body["ids"]}
    assert client.post(SEARCH, json={"like": ["三"], "k": 1}).json()["ids"] == [["三"]]
    page = client.get(POINTS, params={"limit": 2}).json()
    assert page == {"total": 3, "ids": ["one", "zwei"]}
    assert client.request("DELETE", POINTS, json={"ids": ["zwei"]}).json() == {"removed": 1}
    found = client.post(SEARCH, json={"queries": x[:1].tolist(), "ids": ["one"]}).json()
    assert found["ids"] == [["one"]]


def test_safetensors_carries_ids(filled: TestClient) -> None:
    vectors = torch.from_numpy(gaussian(2, DIM, seed=2))
    body = save({"vectors": vectors, "ids": torch.tensor([500, 600])})
    assert post(filled, POINTS, body).json() == {"ids": [500, 600]}
    body = save({"vectors": vectors}, {"ids": "[700, 800]"})
    assert post(filled, POINTS, body).json() == {"ids": [700, 800]}
    answer = post(filled, POINTS, save({"vectors": vectors}, {"ids": "[900"}))
    assert answer.status_code == 400
    assert "ids" in error_of(answer)["message"]


def test_a_collection_says_what_it_holds(filled: TestClient) -> None:
    info = filled.get("/v1/collections/a").json()
    assert info["name"] == "a"
    assert info["vectors"] == 100
    assert info["float32_bytes"] == 100 * DIM * 4
    expected = {"dim": DIM, "bits": 4, "mode": "oblivious", "metric": "cosine", "seed": 0}
    assert expected.items() <= info["settings"].items()
    assert info["memory"]["total"] == sum(v for k, v in info["memory"].items() if k != "total")
    assert filled.get("/v1/collections").json() == {"collections": [info], "damaged": {}}


def test_putting_it_again_changes_nothing(filled: TestClient) -> None:
    assert filled.put("/v1/collections/a", json={"dim": DIM}).json()["vectors"] == 100
    answer = filled.put("/v1/collections/a", json={"dim": DIM, "bits": 2})
    assert answer.status_code == 409
    assert "4" in error_of(answer)["message"]


def test_a_deleted_collection_is_gone(filled: TestClient, tmp_path: Path) -> None:
    assert filled.delete("/v1/collections/a").status_code == 204
    assert filled.get("/v1/collections/a").status_code == 404
    assert filled.delete("/v1/collections/a").status_code == 404
    assert filled.get("/v1/collections").json()["collections"] == []
    assert list((tmp_path / "data" / "collections").iterdir()) == []
    assert list((tmp_path / "data" / "scratch").iterdir()) == []
    assert filled.put("/v1/collections/a", json={"dim": 8}).status_code == 201


def test_all_is_there_after_a_restart(serve: Serve, tmp_path: Path) -> None:
    first = serve()
    first.put("/v1/collections/a", json={"dim": DIM, "mode": "adapted", "bits": 3})
    post(first, POINTS, npy(gaussian(300, DIM)), NPY)
    first.request("DELETE", POINTS, json={"ids": [5]})
    first.post("/v1/collections/a/compact")
    post(first, POINTS, npy(gaussian(10, DIM, seed=1)), NPY)
    asked = {"queries": gaussian(4, DIM, seed=3).tolist()}
    before = first.post(SEARCH, json=asked).json()
    info = first.get("/v1/collections/a").json()
    first.__exit__()  # stops the server
    second = serve()
    assert second.post(SEARCH, json=asked).json() == before
    again = second.get("/v1/collections/a").json()
    assert (again["settings"], again["vectors"]) == (info["settings"], 309)


def test_a_collection_learns_from_a_sample(client: TestClient) -> None:
    client.put("/v1/collections/a", json={"dim": DIM, "mode": "adapted"})
    train = "/v1/collections/a/train"
    assert post(client, train, npy(gaussian(200, DIM)), NPY).status_code == 204
    assert client.post(POINTS, json={"vectors": gaussian(1, DIM).tolist()}).json() == {"ids": [0]}
    answer = post(client, train, npy(gaussian(200, DIM)), NPY)
    assert answer.status_code == 400
    assert "holds 1" in error_of(answer)["message"]


@pytest.mark.parametrize("name", ["..", "a.b", "a b", "-a", "a" * 65, "%2e%2e", "a%2fb", "é", ".a"])
def test_names_are_plain(client: TestClient, name: str, tmp_path: Path) -> None:
    answer = client.put(f"/v1/collections/{name}", json={"dim": DIM})
    assert answer.status_code in (404, 405, 422), answer.text
    assert list((tmp_path / "data" / "collections").iterdir()) == []


NAN = gaussian(2, DIM)
NAN[1, 3] = np.nan
REFUSED: dict[str, tuple[str, dict[str, Any], int]] = {
    "another dim": (SEARCH, {"queries": [[1.0, 2.0]]}, 400),
    "nothing": (SEARCH, {}, 422),
    "both": (SEARCH, {"queries": [[1.0] * DIM], "like": [1]}, 422),
    "unknown point": (SEARCH, {"like": [999]}, 400),
    "k of zero": (SEARCH, {"like": [1], "k": 0}, 422),
    "k beyond the limit": (SEARCH, {"like": [1], "k": 1001}, 413),
    "results beyond the limit": (SEARCH, {"queries": [[0.0] * 2] * 300, "k": 1000}, 413),
    "unknown filter": (SEARCH, {"like": [1], "ids": [1, 999]}, 400),
    "negative ids": (POINTS, {"vectors": [[1.0] * DIM], "ids": [-1]}, 422),
    "ids twice": (POINTS, {"vectors": [[1.0] * DIM] * 2, "ids": [500, 500]}, 400),
    "too few ids": (POINTS, {"vectors": [[1.0] * DIM] * 2, "ids": [500]}, 400),
    "a zero vector": (POINTS, {"vectors": [[0.0] * DIM]}, 400),
    "ragged": (POINTS, {"vectors": [[0.0] * DIM, [1.0]]}, 400),
    "infinite": (POINTS, {"vectors": [[1e300] * DIM]}, 400),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(filled: TestClient, case: str) -> None:
    path, body, status = REFUSED[case]
    answer = filled.post(
        path, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    assert error_of(answer)
    assert filled.get("/v1/collections/a").json()["vectors"] == 100
    assert filled.post(SEARCH, json={"like": [7], "k": 1}).json()["ids"] == [[7]]


@pytest.mark.parametrize("nlist", [0, 8])
def test_lists_are_looked_into_as_asked(client: TestClient, nlist: int) -> None:
    client.put("/v1/collections/a", json={"dim": DIM, "nlist": nlist})
    x = gaussian(1000, DIM)
    post(client, POINTS, npy(x), NPY)
    for options in ({"nprobe": 2}, {"recall": 0.9}, {"nprobe": 10**6}, {}):
        answer = client.post(SEARCH, json={"queries": x[:3].tolist(), "k": 1, **options})
        assert answer.status_code == 200, answer.text
        assert answer.json()["ids"] == [[0], [1], [2]]


def test_limits_of_a_server(serve: Serve) -> None:
    client = serve(max_collections=1, max_vectors=5, max_dense_dim=100)
    assert client.put("/v1/collections/b", json={"dim": 101}).status_code == 413
    assert client.put("/v1/collections/a", json={"dim": DIM}).status_code == 201
    assert client.put("/v1/collections/b", json={"dim": DIM}).status_code == 413
    assert post(client, POINTS, npy(gaussian(5, DIM)), NPY).status_code == 200
    answer = post(client, POINTS, npy(gaussian(1, DIM)), NPY)
    assert answer.status_code == 413
    assert "at most 5" in error_of(answer)["message"]


def test_a_damaged_collection_hurts_no_other(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "collections" / "broken"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    client = serve()
    assert client.put("/v1/collections/a", json={"dim": DIM}).status_code == 201
    listed = client.get("/v1/collections").json()
    assert [c["name"] for c in listed["collections"]] == ["a"]
    assert "manifest.json" in listed["damaged"]["broken"]
    answer = client.get("/v1/collections/broken")
    assert answer.status_code == 500
    assert error_of(answer)["type"] == "damaged"
    assert client.delete("/v1/collections/broken").status_code == 204
    assert not folder.exists()
