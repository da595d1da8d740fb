"""Recall, speed and size of vector indexes on one set of vectors, in one run: ours and peers.

    python -m benchmarks.vector_search out/minilm.npy [--queries 1000] [--only PATTERN]

The last vectors are the queries; neighbours are exact inner products. Times are CPU time of the
process with one thread, so that other work on the machine counts less: queries a second in one
batch, the best of three, and the median of single queries. Bytes are those of a vector's code and
numbers. Peers that are not installed are left out. Rows go to `results/index_peers_cpu.jsonl`,
each as soon as it is measured; `python -m benchmarks.search_tables` draws them.

    python -m benchmarks.vector_search out/minilm.npy --fields 2 --only 'd (ada|cen|obl)|RaBitQ'

makes longer vectors of the same: each is the embeddings of so many sentences that follow each
other in the file, normalized together, as documents of several fields are embedded. Such rows go to
`results/index_peers_fields_cpu.jsonl`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import RESULTS, environment, put_row
from quantforge.vectordb import IndexConfig, QuantizedIndex

K = 10
SINGLES = 60
BATCHES = 3
PEERS = ("faiss-cpu", "turbovec", "usearch")
Search = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Built:
    """An index that is ready.

    Attributes:
        searches: by setting, a function from queries (q, dim) to rows (q, K).
        code_bytes: of a vector.
        total_bytes: of the index, as it is stored or reports itself.
    """

    searches: dict[str, Search]
    code_bytes: float
    total_bytes: int


@dataclass(frozen=True)
class Case:
    """An index to build: its name, its bits a number, and how."""

    name: str
    bits: float
    build: Callable[[np.ndarray], Built]


def ours(bits: int, mode: str, *, nlist: int = 0, nprobes: tuple[int, ...] = ()) -> Case:
    """Return a flat index of a mode, or one with lists."""

    def build(x: np.ndarray) -> Built:
        index = QuantizedIndex(x.shape[1], IndexConfig(bits=bits, mode=mode, nlist=nlist))  # type: ignore[arg-type]
        index.add(x)
        assert index._core is not None
        searches: dict[str, Search] = {}
        for nprobe in nprobes:
            searches[f"nprobe {nprobe}"] = lambda q, p=nprobe: index.search(q, K, nprobe=p)[0]
        if not nprobes:
            searches[""] = lambda q: index.search(q, K)[0]
        size = index._core.codec.row_bytes
        return Built(searches, size, index.memory_report()["total"])

    name = f"quantforge {mode}" + (f" IVF{nlist}" if nlist else "")
    return Case(f"{name} {bits} bits", bits, build)


def faiss_case(
    name: str, bits: float, make: Callable[[Any, int], Any], nprobes: tuple[int, ...] = ()
) -> Case:
    """Return a FAISS index; `make(faiss, dim)` constructs it."""

    def build(x: np.ndarray) -> Built:
        import faiss

        faiss.omp_set_num_threads(1)
        index = make(faiss, x.shape[1])
        index.train(x)
        index.add(x)
        searches: dict[str, Search] = {}

        def with_nprobe(q: np.ndarray, nprobe: int) -> np.ndarray:
            faiss.extract_index_ivf(index).nprobe = nprobe
            return index.search(q, K)[1]

        for nprobe in nprobes:
            searches[f"nprobe {nprobe}"] = lambda q, p=nprobe: with_nprobe(q, p)
        if not nprobes:
            searches[""] = lambda q: index.search(q, K)[1]
        total = len(faiss.serialize_index(index))
        code = index.code_size if hasattr(index, "code_size") else total / len(x)
        return Built(searches, code, total)

    return Case(f"FAISS {name}", bits, build)


def turbovec_case(bits: int) -> Case:
    """Return turbovec, calibrated on the first vectors."""

    def build(x: np.ndarray) -> Built:
        import turbovec

        index = turbovec.TurboQuantIndex(x.shape[1], bits)
        index.calibrate(x[:1024])
        index.add(x)
        index.prepare()
        total = len(index.to_bytes())
        return Built({"": lambda q: index.search(q, K)[1]}, total / len(x), total)

    return Case(f"turbovec calibrated {bits} bits", bits, build)


def hnsw_case(dtype: str, bits: int | None = None) -> Case:
    """Return usearch's graph over the vectors, or over what our codes of some bits stand for."""

    def build(x: np.ndarray) -> Built:
        from usearch.index import Index

        if bits is not None:
            index = QuantizedIndex(x.shape[1], IndexConfig(bits=bits, nlist=0))
            x = index.reconstruct(index.add(x))
        graph = Index(ndim=x.shape[1], metric="ip", dtype=dtype, connectivity=16)
        graph.add(np.arange(len(x)), x, threads=1)

        def search(q: np.ndarray, ef: int) -> np.ndarray:
            graph.expansion_search = ef
            return np.atleast_2d(graph.search(q, K, threads=1).keys).astype(np.int64)

        searches = {f"ef {ef}": lambda q, e=ef: search(q, e) for ef in (32, 128, 512)}
        total = graph.memory_usage
        return Built(searches, total / len(x), total)

    what = dtype if bits is None else f"over our {bits}-bit codes"
    return Case(f"usearch HNSW16 {what}", 16, build)


def cases(dim: int) -> Iterator[Case]:
    """Yield all indexes whose libraries are installed."""
    for bits in (1, 2, 3, 4):
        for mode in ("adapted", "centred", "oblivious"):
            yield ours(bits, mode)
    for bits in (2, 4):
        yield ours(bits, "adapted", nlist=256, nprobes=(8, 32))
    if importlib.util.find_spec("faiss") is not None:
        yield from faiss_cases(dim)
    if importlib.util.find_spec("turbovec") is not None:
        yield from (turbovec_case(bits) for bits in (2, 3, 4))
    if importlib.util.find_spec("usearch") is not None:
        yield hnsw_case("f16")
        yield hnsw_case("f16", bits=4)


def faiss_cases(dim: int) -> Iterator[Case]:
    """Yield FAISS's indexes."""

    def factory(key: str) -> Callable[[Any, int], Any]:
        return lambda faiss, dim: faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)

    def rabitq(bits: int) -> Callable[[Any, int], Any]:
        return lambda faiss, dim: faiss.IndexRaBitQFastScan(
            dim, faiss.METRIC_INNER_PRODUCT, 32, bits
        )

    yield faiss_case("Flat", 32, factory("Flat"))
    yield faiss_case("SQ4", 4, factory("SQ4"))
    for bits in (1, 2):
        key = f"PQ{bits * dim // 4}x4fs"
        yield faiss_case(key, bits, factory(key))
    for bits in (1, 2, 3, 4):
        yield faiss_case(f"RaBitQFastScan {bits} bits", bits, rabitq(bits))
    key = f"IVF256,PQ{dim // 2}x4fs"
    yield faiss_case(key, 2, factory(key), (8, 32))
    yield faiss_case("IVF256,SQ4", 4, factory("IVF256,SQ4"), (8, 32))


def of_fields(rows: np.ndarray, count: int) -> np.ndarray:
    """Return vectors (n / count, count * dim) of length 1 from `count` rows (n, dim) each."""
    whole = rows[: len(rows) // count * count].reshape(-1, count * rows.shape[1])
    return whole / np.linalg.norm(whole, axis=1, keepdims=True)


def neighbours(x: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the exact rows (q, K)."""
    parts = torch.from_numpy(queries).split(100)
    rows = torch.from_numpy(x)
    return torch.cat([(part @ rows.T).topk(K).indices for part in parts]).numpy()


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of exact neighbours among those found."""
    return float((found[:, :, None] == exact[:, None, :]).any(1).mean())


def measure(case: Case, x: np.ndarray, queries: np.ndarray, exact: np.ndarray) -> Iterator[dict]:
    """Build an index and yield a row for each of its settings."""
    start = time.process_time()
    built = case.build(x)
    build_s = time.process_time() - start
    for setting, search in built.searches.items():
        found = search(queries)
        batch = min(_seconds(search, queries) for _ in range(BATCHES))
        some = range(min(SINGLES, len(queries)))
        single = statistics.median(_seconds(search, queries[i : i + 1]) for i in some)
        yield {
            "case": f"{case.name} {setting}".strip(),
            "bits": case.bits,
            "recall": recall(found, exact),
            "code_bytes": built.code_bytes,
            "total_bytes": built.total_bytes,
            "qps": len(queries) / batch,
            "single_ms": 1e3 * single,
            "build_s": build_s,
        }


def _seconds(search: Search, queries: np.ndarray) -> float:
    start = time.process_time()
    search(queries)
    return time.process_time() - start


def versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vectors", type=Path, help=".npy file of float32 (n, dim)")
    parser.add_argument("--queries", type=int, default=1000, help="the last vectors")
    parser.add_argument("--only", default="", help="regular expression of names")
    parser.add_argument("--fields", type=int, default=1, help="vectors of so many rows each")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # turbovec's, read when its pool starts
    rows = np.load(args.vectors).astype(np.float32)
    if args.fields > 1:
        rows = of_fields(rows, args.fields)
    name = "index_peers_cpu.jsonl" if args.fields == 1 else "index_peers_fields_cpu.jsonl"
    output = args.output or RESULTS / name
    x, queries = rows[: -args.queries], rows[-args.queries :]
    exact = neighbours(x, queries)
    shared = {"n": len(x), "dim": x.shape[1], "queries": len(queries), "k": K}
    where = {**environment("cpu"), **versions()}
    for case in cases(x.shape[1]):
        if not re.search(args.only, case.name):
            continue
        for row in measure(case, x, queries, exact):
            if args.fields > 1:
                row["case"] += f", {args.fields} fields"
            put_row(output, {**row, **shared, "environment": where})
            print(
                f"{row['case']:40} recall {row['recall']:.3f}  {row['code_bytes']:6.0f} bytes  "
                f"{row['qps']:7.0f} qps  {row['single_ms']:7.3f} ms  build {row['build_s']:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
