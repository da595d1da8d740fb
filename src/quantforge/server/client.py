"""`Client`: a quantforge server from Python; needs httpx."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch

from quantforge.errors import QuantForgeError
from quantforge.io import load_file, save_file
from quantforge.tensor import QuantTensor

SAFETENSORS = {"Content-Type": "application/vnd.safetensors"}
POLL_S = 0.2


class ServerError(QuantForgeError):
    """What a server refused, or could not do.

    Attributes:
        status: HTTP status.
        type: one word for programs.
        remedy: what to do, if the server knows.
    """

    def __init__(self, status: int, type: str, message: str, remedy: str | None) -> None:
        super().__init__(message if remedy is None else f"{message}; {remedy}")
        self.status, self.type, self.remedy = status, type, remedy


class ShardsFound(NamedTuple):
    """What the shards of a server hold near each query.

    Attributes:
        ids: by query, best first.
        scores: likewise.
        missing: why ranks did not contribute, by rank; empty if the result is whole.
    """

    ids: list[list[Any]]
    scores: list[list[float]]
    missing: dict[int, str]


class Client:
    """Speaks to one server; vectors travel as safetensors, results come back as arrays.

        with Client("http://127.0.0.1:8000") as client:
            codes = client.compress(vectors, bits=4)
            client.create_collection("notes", dim=384)
            ids = client.add("notes", vectors)
            ids, scores = client.search("notes", queries, k=10)

    A busy server is asked again, as often as `retries` says. Jobs are waited for.

    Args:
        url: of the server.
        token: its token, if it has one.
        timeout_s: of one request.
        retries: times to ask a busy server again.
        transport: of httpx, for tests.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 8,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=timeout_s, transport=transport
        )
        self._retries, self._timeout_s = retries, timeout_s

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def version(self) -> dict[str, str]:
        """Return what is running there."""
        return self._json("GET", "/version")

    # ---- tensors ----------------------------------------------------------------------------

    def compress(self, vectors: Any, **settings: Any) -> QuantTensor:
        """Pack vectors (..., dim), numpy or torch.

        Args:
            vectors: of a floating-point dtype.
            settings: `bits`, and the other settings of `QuantForgeConfig`.

        Raises:
            ServerError: for what the server refuses.
        """
        body = _to_bytes({"vectors": _tensor(vectors)})
        answer = self._send("/v1/compress", body, settings)
        return _from_bytes(answer.content)["vectors"]  # type: ignore[return-value]

    def decompress(self, q: QuantTensor) -> torch.Tensor:
        """Decode what `compress` returned, or any QuantTensor."""
        answer = self._send("/v1/decompress", _to_bytes({"vectors": q}), {})
        return _from_bytes(answer.content)["vectors"]

    def benchmark(self, vectors: Any, **settings: Any) -> dict[str, Any]:
        """Measure error, recall, bytes and speed; `bits` may be a list."""
        return self._send(
            "/v1/benchmark", _to_bytes({"vectors": _tensor(vectors)}), settings
        ).json()

    def optimize(self, vectors: Any, **settings: Any) -> dict[str, Any]:
        """Search for the best settings for vectors."""
        return self._send("/v1/optimize", _to_bytes({"vectors": _tensor(vectors)}), settings).json()

    # ---- collections ------------------------------------------------------------------------

    def collections(self) -> list[dict[str, Any]]:
        """Return what the server holds, by collection."""
        return self._json("GET", "/v1/collections")["collections"]

    def create_collection(self, name: str, dim: int, **settings: Any) -> dict[str, Any]:
        """Make a collection, or return the one that has these settings."""
        return self._json("PUT", f"/v1/collections/{name}", json={"dim": dim, **settings})

    def collection(self, name: str) -> dict[str, Any]:
        """Return settings and sizes of a collection."""
        return self._json("GET", f"/v1/collections/{name}")

    def delete_collection(self, name: str) -> None:
        """Delete a collection with its files."""
        self._request("DELETE", f"/v1/collections/{name}")

    def train(self, name: str, vectors: Any) -> None:
        """Let a collection learn from a sample before anything is added."""
        self._send(f"/v1/collections/{name}/train", _to_bytes({"vectors": _tensor(vectors)}), {})

    def add(
        self, name: str, vectors: Any, ids: Any = None, metadata: dict[str, Any] | None = None
    ) -> list[Any]:
        """Add vectors (n, dim); they are on the server's disk when this returns.

        Returns:
            Their ids.
        """
        header = {}
        if ids is not None:
            header["ids"] = json.dumps(np.asarray(ids).tolist())
        if metadata is not None:
            header["metadata"] = json.dumps(
                {k: np.asarray(v).tolist() for k, v in metadata.items()}
            )
        body = _to_bytes({"vectors": _tensor(vectors)}, header)
        return self._send(f"/v1/collections/{name}/points", body, {}).json()["ids"]

    def remove(self, name: str, ids: Any) -> int:
        """Remove points by id, and return how many."""
        body = {"ids": np.asarray(ids).tolist()}
        return self._json("DELETE", f"/v1/collections/{name}/points", json=body)["removed"]

    def search(
        self, name: str, queries: Any = None, k: int = 10, **options: Any
    ) -> tuple[list[list[Any]], list[list[float]]]:
        """Find the nearest points of queries (q, dim), or of points that are there: `like=ids`.

        Args:
            name: of the collection.
            queries: vectors.
            k: neighbours of each.
            options: `like`, `ids`, `where`, `nprobe`, `recall`.

        Returns:
            ids and scores by query, best first.
        """
        body = {"k": k, **options}
        if queries is not None:
            body["queries"] = np.asarray(queries, np.float64).tolist()
        answer = self._json("POST", f"/v1/collections/{name}/search", json=body)
        return answer["ids"], answer["scores"]

    # ---- shards -----------------------------------------------------------------------------

    def shards(self) -> dict[str, Any]:
        """Return what the ranks of a server started with `--shards` hold, files by rank."""
        return self._json("GET", "/v1/shards")

    def search_shards(
        self, queries: Any, k: int = 10, *, timeout_s: float = 10.0, **options: Any
    ) -> ShardsFound:
        """Find the nearest vectors of queries (q, dim) in the shards of all ranks.

        Args:
            queries: vectors.
            k: neighbours of each.
            timeout_s: until ranks that have not answered are missing, at most 60.
            options: `on_failure` ("error", or "partial" to have what the others find), `where`,
                `nprobe`, `recall`.

        Raises:
            ServerError: of type "ranks" if ranks are missing, unless `on_failure` is "partial".
        """
        body = {"k": k, "timeout_s": timeout_s, **options}
        body["queries"] = np.asarray(queries, np.float64).tolist()
        answer = self._json(
            "POST", "/v1/shards/search", json=body, timeout=self._timeout_s + 2 * timeout_s
        )
        missing = {int(rank): why for rank, why in answer["missing"].items()}
        return ShardsFound(answer["ids"], answer["scores"], missing)

    def rebalance_shards(self, without: Any = (), *, timeout_s: float = 600.0) -> dict[str, Any]:
        """Spread the files that are in the folder now over the ranks; return what `shards` does.

        Args:
            without: ranks that get none, because they are gone.
            timeout_s: until all ranks have loaded theirs, at most 3600.
        """
        body = {"without": np.asarray(without, np.int64).tolist(), "timeout_s": timeout_s}
        return self._json(
            "POST", "/v1/shards/rebalance", json=body, timeout=self._timeout_s + 2 * timeout_s
        )

    # ---- inside -----------------------------------------------------------------------------

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        for attempt in range(self._retries + 1):
            answer = self._http.request(method, path, **options)
            if answer.status_code != 429 or attempt == self._retries:
                break
            time.sleep(float(answer.headers.get("Retry-After", 1)))
        if answer.is_success:
            return answer
        try:
            error = answer.json()["error"]
            found = ServerError(
                answer.status_code, error["type"], error["message"], error.get("remedy")
            )
        except (ValueError, KeyError, TypeError):
            found = ServerError(answer.status_code, "http", f"answered {answer.text[:200]!r}", None)
        raise found

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        return self._request(method, path, **options).json()

    def _send(self, path: str, body: bytes, query: dict[str, Any]) -> httpx.Response:
        answer = self._request("POST", path, content=body, params=query, headers=SAFETENSORS)
        if answer.status_code != 202:
            return answer
        job = answer.json()
        while job["state"] in ("waiting", "running"):
            time.sleep(POLL_S)
            job = self._json("GET", f"/v1/jobs/{job['id']}")
        result = self._request("GET", f"/v1/jobs/{job['id']}/result")
        self._request("DELETE", f"/v1/jobs/{job['id']}")
        return result


def _tensor(vectors: Any) -> torch.Tensor:
    if isinstance(vectors, torch.Tensor):
        return vectors
    return torch.from_numpy(np.array(vectors))


def _to_bytes(tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "body"
        save_file(tensors, path, metadata=header)
        return path.read_bytes()


def _from_bytes(body: bytes) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "body"
        path.write_bytes(body)
        return load_file(path)
