"""What recipes/export_vectors.py wrote is imported by LanceDB, Qdrant and Milvus, embedded.

Not part of the default run; in an environment with `pip install lancedb qdrant-client pymilvus
milvus-lite`:

    python recipes/export_vectors.py --small --output out
    python -m pytest -c /dev/null --noconftest tests/recipes/databases.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

OUT = Path("out")
K = 5


def expected(ids: np.ndarray, x: np.ndarray, query: np.ndarray) -> set[int]:
    return set(ids[np.argsort(-(x @ query))[:K]].tolist())


def test_lancedb(tmp_path: Path) -> None:
    import lancedb

    ids, x = np.load(OUT / "ids.npy"), np.load(OUT / "vectors.npy")
    rows = lancedb.connect(tmp_path).create_table("t", pq.read_table(OUT / "vectors.parquet"))
    assert rows.count_rows() == len(ids)
    found = rows.search(x[3]).distance_type("dot").limit(K).to_list()
    assert {row["id"] for row in found} == expected(ids, x, x[3])


def test_qdrant() -> None:
    from qdrant_client import QdrantClient, models

    ids, x = np.load(OUT / "ids.npy"), np.load(OUT / "vectors.npy")
    client = QdrantClient(":memory:")
    params = models.VectorParams(size=x.shape[1], distance=models.Distance.DOT)
    client.create_collection("t", vectors_config=params)
    client.upload_collection("t", vectors=x, ids=ids.tolist())
    found = client.query_points("t", query=x[3].tolist(), limit=K).points
    assert {point.id for point in found} == expected(ids, x, x[3])


def test_milvus(tmp_path: Path) -> None:
    from pymilvus import MilvusClient

    ids, x = np.load(OUT / "ids.npy"), np.load(OUT / "vectors.npy")
    client = MilvusClient(str(tmp_path / "milvus.db"))
    client.create_collection("t", dimension=x.shape[1], metric_type="IP")
    client.insert("t", pq.read_table(OUT / "vectors.parquet").to_pylist())
    (found,) = client.search("t", [x[3].tolist()], limit=K)
    assert {hit["id"] for hit in found} == expected(ids, x, x[3])
