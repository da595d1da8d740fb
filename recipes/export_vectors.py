"""Vectors out of quantforge, as other databases import them.

    python recipes/export_vectors.py index.safetensors --output out

    out/index.faiss      faiss.read_index
    out/vectors.parquet  columns id, vector: lancedb `create_table(name, pq.read_table(...))`;
                         Milvus and Qdrant clients take its rows and columns
    out/vectors.npy, out/ids.npy    the same for numpy

No database takes the codes of another: what goes out is what codes stand for, float32. The claims,
asserted: FAISS finds in its file what exact search finds among the decoded vectors, and all files
hold the same vectors under the same ids. `--small` makes an index of its own.
"""

import argparse
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quantforge.vectordb import IndexConfig, QuantizedIndex
from quantforge.vectordb.faiss_io import to_faiss

BATCH = 1 << 14


def schema_of(dim: int) -> pa.Schema:
    """Return the columns; lists have one length, as lancedb wants of vectors."""
    vector = pa.list_(pa.float32(), dim)
    return pa.schema([pa.field("id", pa.int64(), False), pa.field("vector", vector, False)])


def export(index: QuantizedIndex, output: Path) -> None:
    """Write all files, in the memory of a batch but for FAISS, which holds its index."""
    output.mkdir(parents=True, exist_ok=True)
    faiss.write_index(to_faiss(index), str(output / "index.faiss"))
    ids, schema = index.ids, schema_of(index.dim)
    np.save(output / "ids.npy", ids)
    shape = (len(ids), index.dim)
    array = np.lib.format.open_memmap(output / "vectors.npy", "w+", np.float32, shape)
    with pq.ParquetWriter(output / "vectors.parquet", schema) as writer:
        for start in range(0, len(ids), BATCH):
            some = ids[start : start + BATCH]
            x = array[start : start + BATCH] = index.reconstruct(some)
            lists = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), index.dim)
            writer.write_batch(pa.record_batch([pa.array(some), lists], schema=schema))
    array.flush()


def check(index: QuantizedIndex, output: Path) -> None:
    """Read everything back."""
    ids, x = np.load(output / "ids.npy"), np.load(output / "vectors.npy")
    table = pq.read_table(output / "vectors.parquet")
    np.testing.assert_array_equal(table["id"].to_numpy(), ids)
    flat = table["vector"].combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(flat.reshape(x.shape), x)

    other, queries = faiss.read_index(str(output / "index.faiss")), x[:5]
    if index.nlist > 1:
        faiss.extract_index_ivf(other).nprobe = index.nlist
    if index.config.metric == "cosine":
        length = np.linalg.norm(x, axis=1, keepdims=True)
        x = x / np.maximum(length, np.finfo(np.float32).tiny)
    if index.config.metric == "l2":
        best = ((queries[:, None] - x) ** 2).sum(-1).min(1)
    else:
        best = (queries @ x.T).max(1)
    scores, found = other.search(queries, 1)
    assert np.isin(found, ids).all()
    np.testing.assert_allclose(scores[:, 0], best, rtol=1e-4, atol=1e-4)


def small() -> QuantizedIndex:
    rng = np.random.RandomState(0)
    index = QuantizedIndex(64, IndexConfig(bits=4))
    index.add(rng.randn(2000, 64).astype(np.float32), rng.permutation(5000)[:2000])
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index", type=Path, nargs="?", help="saved by QuantizedIndex.save")
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--small", action="store_true", help="make a small index instead")
    args = parser.parse_args()
    if not args.small and args.index is None:
        parser.error("name an index, or take --small")
    index = small() if args.small else QuantizedIndex.load(args.index)
    export(index, args.output)
    check(index, args.output)
    for path in sorted(args.output.iterdir()):
        print(f"{path.name:16} {path.stat().st_size:>12,} bytes")
    print(f"{len(index):,} vectors were written, read back and found")


if __name__ == "__main__":
    main()
