"""`QuantizedIndex` under the contract of ann-benchmarks.

ann-benchmarks constructs an algorithm with a metric and arguments, calls `fit` once, then for each
group of query arguments `set_query_arguments` and either `query` for every vector or `batch_query`
and `get_batch_results`. An entry of its configuration:

    float:
      any:
      - name: quantforge
        module: benchmarks.ann_benchmarks
        constructor: QuantForge
        base_args: ["@metric"]
        run_groups:
          bits:
            args: [[2, 3, 4]]
            query_args: [[1, 4, 16, 64], [0, 10]]

    python -m benchmarks.ann_benchmarks out/minilm.npy --bits 4

Source of the contract: github.com/erikbern/ann-benchmarks, algorithms/base/module.py.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from quantforge.vectordb import IndexConfig, QuantizedIndex

METRICS = {"angular": "cosine", "euclidean": "l2", "dot": "ip"}


class QuantForge:
    """An index for ann-benchmarks.

    Args:
        metric: "angular", "euclidean" or "dot".
        bits: bits a number.
        originals: vectors kept for `rerank`: "float16" or "none".
    """

    def __init__(self, metric: str, bits: int, originals: str = "float16") -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
        settings: dict[str, Any] = {"metric": METRICS[metric], "originals": originals}
        self.config = IndexConfig(bits=bits, **settings)
        self.index: QuantizedIndex | None = None
        self.nprobe = 1
        self.rerank = 0
        self.found: np.ndarray | None = None

    def fit(self, X: np.ndarray) -> None:
        """Build the index of vectors (n, dim)."""
        self.index = QuantizedIndex(X.shape[1], self.config)
        self.index.add(np.asarray(X, np.float32))

    def set_query_arguments(self, nprobe: int, rerank: int = 0) -> None:
        """Look into so many lists; order `rerank` times k candidates by the vectors kept."""
        self.nprobe, self.rerank = nprobe, rerank

    def query(self, q: np.ndarray, n: int) -> np.ndarray:
        """Return the ids of the n nearest neighbours of one vector."""
        return self._search(np.asarray(q, np.float32)[None], n)[0]

    def batch_query(self, X: np.ndarray, n: int) -> None:
        """Search for all vectors; `get_batch_results` returns what was found."""
        self.found = self._search(np.asarray(X, np.float32), n)

    def get_batch_results(self) -> np.ndarray:
        """Return the ids (q, n) of the last batch."""
        if self.found is None:
            raise RuntimeError("get_batch_results comes after batch_query")
        return self.found

    def get_memory_usage(self) -> float:
        """Return what the index holds, in kB."""
        return 0.0 if self.index is None else self.index.memory_report()["total"] / 1024

    def get_additional(self) -> dict[str, Any]:
        """Return what is kept with the results."""
        return {} if self.index is None else {"nlist": self.index.nlist}

    def done(self) -> None:
        """Let go of the index."""
        self.index = self.found = None

    def __str__(self) -> str:
        return f"QuantForge(bits={self.config.bits}, nprobe={self.nprobe}, rerank={self.rerank})"

    def _search(self, queries: np.ndarray, n: int) -> np.ndarray:
        if self.index is None:
            raise RuntimeError("a query comes after fit")
        options = {"rerank": min(self.rerank * n, len(self.index))} if self.rerank else {}
        return self.index.search(queries, n, nprobe=self.nprobe, **options)[0]


def main() -> None:
    """Run the contract on a file of vectors, the last of which are queries."""
    parser = argparse.ArgumentParser(description="ann-benchmarks' contract on one file")
    parser.add_argument("vectors", type=Path, help=".npy file (n, dim)")
    parser.add_argument("--metric", default="angular", choices=tuple(METRICS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--queries", type=int, default=100)
    args = parser.parse_args()
    rows = np.load(args.vectors)
    x, queries = rows[: -args.queries], rows[-args.queries :]
    algorithm = QuantForge(args.metric, args.bits)
    algorithm.fit(x)
    exact = QuantForge(args.metric, 8)
    exact.fit(x)
    exact.set_query_arguments(1 << 30, 10)
    exact.batch_query(queries, 10)
    truth = exact.get_batch_results()
    for nprobe in (1, 8, 64, 512):
        for rerank in (0, 10):
            algorithm.set_query_arguments(nprobe, rerank)
            start = time.perf_counter()
            algorithm.batch_query(queries, 10)
            middle = time.perf_counter()
            found = algorithm.get_batch_results()
            alone = np.stack([algorithm.query(q, 10) for q in queries])
            batch, single = middle - start, time.perf_counter() - middle
            assert np.array_equal(found, alone), "a batch finds what its queries find alone"
            recall = (found[:, :, None] == truth[:, None]).any(1).mean()
            print(
                f"{algorithm}  recall@10 {recall:.3f}  in a batch {len(queries) / batch:.0f} "
                f"queries/s, one by one {len(queries) / single:.0f}"
            )
    print(f"{algorithm.get_memory_usage():.0f} kB, {algorithm.get_additional()}")


if __name__ == "__main__":
    main()
