"""A billion vectors on paper: bytes, network and latency of `ShardedIndex`, checked against itself.

    python -m benchmarks.sharded_model [--vectors 200000]
    python -m benchmarks.sharded_model --print          the tables of docs/distributed.md

A search over S shards on R ranks is taken to be

    share * (S / R * call + rows / R * row) + exchange(R) + merge * q * R

`call` and `row` are the CPU time of one process with one file, by the number of queries q: a line
through two files of other lengths. `exchange`, a request and R - 1 answers without any search, and
`merge` are measured on their own. `share` is 1 where each rank has a core, else ranks / cores. All
are the fastest of many, as what else a host does only adds to them. The check searches shards with
1, 2 and 4 processes, by the clock, and stands beside what the model says. For comparison,
`built_gb_s` is what results/index_peers_cpu.jsonl says of an index that was built and not loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.distributed import TCPStore

from benchmarks import record
from quantforge.vectordb import IndexConfig, QuantizedIndex
from quantforge.vectordb.sharded import ShardedIndex, _encode
from quantforge.vectordb.shards import merge_found, search_exactly

NAME = "sharded_model"
DIM, BITS, K, SHARDS = 384, 4, 10, 4
BATCHES = (1, 16)
WORLDS = (1, 2, 4)
BILLION = 10**9
RANKS = (16, 64, 256)
CORES = 16
LISTS_READ = 0.125
"""Share of the rows that a search with lists reads: nprobe 32 of 256, as in index_peers_cpu."""

WORKER = """
import sys
from datetime import timedelta
from torch.distributed import TCPStore
from quantforge.vectordb.sharded import ShardedIndex
folder, port, rank, world = sys.argv[1], *map(int, sys.argv[2:])
store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60))
ShardedIndex(folder, store, rank, world).serve()
"""


@dataclass(frozen=True)
class Constants:
    """What the model knows.

    Attributes:
        call_ms: a search of one shard, whatever its size, by queries.
        row_ns: for each row more, by queries; of one core.
        vector_bytes: all that an index holds for a vector.
        exchange_ms: request and answers, with one other rank.
        rank_ms: for each rank more.
        merge_ms: for each query and part.
    """

    call_ms: dict[int, float]
    row_ns: dict[int, float]
    vector_bytes: float
    exchange_ms: float
    rank_ms: float
    merge_ms: float

    def search_ms(
        self, q: int, rows: float, shards: int, ranks: int, cores: int = 1, share: float = 1.0
    ) -> float:
        """Return the time of a search; rows and shards are those of all ranks."""
        scan = shards * self.call_ms[q] + rows * self.row_ns[q] / 1e6 / cores
        exchange = self.exchange_ms + self.rank_ms * (ranks - 2) if ranks > 1 else 0.0
        return share * scan / ranks + exchange + self.merge_ms * q * ranks


def built_gb_s() -> float:
    """Return the codes that a core reads a second in a batch, by results/index_peers_cpu.jsonl."""
    rows = {row["case"]: row for row in record.read_rows(record.RESULTS / "index_peers_cpu.jsonl")}
    row = rows[f"quantforge oblivious {BITS} bits"]
    return row["qps"] * row["n"] * row["code_bytes"] / 1e9


def fastest_ms(
    f: Callable[[], object], repeats: int = 61, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the least time of a call, after two others."""
    times = []
    for _ in range(repeats + 2):
        start = clock()
        f()
        times.append(1e3 * (clock() - start))
    return min(times[2:])


@contextmanager
def ranks_of(folder: Path, world: int) -> Iterator[ShardedIndex]:
    """Yield rank 0 of processes that hold the shards of a folder."""
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    command = [sys.executable, "-c", WORKER, str(folder), str(store.port)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(world)], env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        for rank in range(1, world)
    ]
    index = ShardedIndex(folder, store, 0, world, timeout=120)
    try:
        yield index
    finally:
        index.close()
        for worker in workers:
            worker.wait(30)


def exchange_ms(index: ShardedIndex, queries: np.ndarray) -> float:
    """Return the time of a request that nobody searches for, as long as one of a search."""

    def ask() -> None:
        index._post({"queries": queries}, {})
        missing = index._collect(10.0)[1]
        assert not missing

    return fastest_ms(ask)


def merge_ms() -> float:
    """Return the time that a query and a part add to a merge."""
    part = (np.arange(16 * K).reshape(16, K), np.random.RandomState(0).randn(16, K))
    few, many = (
        fastest_ms(lambda n=n: merge_found([part] * n, K, squared=False), clock=time.process_time)
        for n in (2, 34)
    )
    return max(few / 32, (many - few) / (32 * 16))


def scan_line(files: list[Path], queries: np.ndarray) -> tuple[float, float]:
    """Return call_ms and row_ns of a search in one file: a line through two of them."""
    indexes = [QuantizedIndex.load(path) for path in files]
    times = [
        fastest_ms(lambda i=index: search_exactly(i, queries, K), clock=time.process_time)
        for index in indexes
    ]
    row_ms, call_ms = np.polyfit([len(index) for index in indexes], times, 1)
    return float(call_ms), float(1e6 * row_ms)


def measure(vectors: int) -> tuple[Constants, list[dict]]:
    """Return the constants, and searches of 1, 2 and 4 processes beside what the model says."""
    rng = np.random.RandomState(0)
    data = rng.standard_normal((vectors, DIM)).astype(np.float32)
    queries = rng.standard_normal((max(BATCHES), DIM)).astype(np.float32)
    index = QuantizedIndex(DIM, IndexConfig(bits=BITS, mode="oblivious", metric="ip", nlist=0))
    few = vectors // 8
    index.add(data[:few])
    few_bytes = index.memory_report()["total"]
    exchanges, measured = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "few.safetensors"), Path(folder, "all.safetensors")]
        index.save(files[0])
        index.add(data[few:])
        index.save(files[1])
        vector_bytes = (index.memory_report()["total"] - few_bytes) / (vectors - few)
        lines = {q: scan_line(files, queries[:q]) for q in BATCHES}
        shards = Path(folder, "shards")
        shards.mkdir()
        for i, part in enumerate(index.shard(SHARDS)):
            part.save(shards / f"{i}.safetensors")
        for world in WORLDS:
            with ranks_of(shards, world) as sharded:
                exchanges[world] = exchange_ms(sharded, queries[:1])
                for q in BATCHES:
                    asked = queries[:q]
                    measured[world, q] = fastest_ms(lambda s=sharded, a=asked: s.search(a, K))
    constants = Constants(
        {q: call for q, (call, _) in lines.items()},
        {q: row for q, (_, row) in lines.items()},
        vector_bytes,
        exchanges[2],
        max((exchanges[4] - exchanges[2]) / 2, 0.0),
        merge_ms(),
    )
    cores = os.cpu_count() or 1
    rows = []
    for (world, q), ms in measured.items():
        share = max(1.0, world / cores)
        predicted = constants.search_ms(q, vectors, SHARDS, world, share=share)
        rows.append({"ranks": world, "queries": q, "measured_ms": ms, "predicted_ms": predicted})
    return constants, rows


def project(constants: Constants) -> list[dict]:
    """Return what a billion vectors would take, on ranks with cores of their own."""
    request = len(_encode({"queries": np.zeros((1, DIM), np.float32)}, {"k": K, "options": {}}))
    found = {"ids": np.zeros((1, K), np.int64), "scores": np.zeros((1, K), np.float32)}
    reply = len(_encode(found, {}))
    rows = []
    for ranks in RANKS:
        searches = {
            name: constants.search_ms(1, BILLION * read, ranks, ranks, CORES)
            for name, read in (("flat_ms", 1.0), ("lists_ms", LISTS_READ))
        }
        rows.append(
            {
                "ranks": ranks,
                "gib_per_rank": BILLION * constants.vector_bytes / ranks / 2**30,
                "network_kib_per_query": (ranks - 1) * (request + reply) / 1024,
                **searches,
                "exchange_ms": constants.exchange_ms + constants.rank_ms * (ranks - 2),
            }
        )
    return rows


def tables(result: dict) -> tuple[str, str]:
    """Return the tables of docs/distributed.md: the check, and a billion vectors."""
    check = ["| ranks | queries | measured ms | model ms |", "|---|---|---|---|"]
    check += [
        f"| {row['ranks']} | {row['queries']} | {row['measured_ms']:.1f} "
        f"| {row['predicted_ms']:.1f} |"
        for row in result["check"]
    ]
    billion = [
        "| ranks | GiB each | network KiB a query | all rows, ms | an eighth of them, ms "
        "| of it exchange |",
        "|---|---|---|---|---|---|",
    ]
    billion += [
        f"| {row['ranks']} | {row['gib_per_rank']:.1f} | {row['network_kib_per_query']:.0f} "
        f"| {row['flat_ms']:.0f} | {row['lists_ms']:.0f} | {row['exchange_ms']:.1f} |"
        for row in result["billion"]
    ]
    return "\n".join(check), "\n".join(billion)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parser.add_argument("--print", action="store_true", help="what was written before")
    args = parser.parse_args()
    if args.print:
        print(*tables(record.load(NAME, args.folder)["rows"][0]), sep="\n\n")
        return
    torch.set_num_threads(1)
    constants, check = measure(args.vectors)
    result = {
        "vectors": args.vectors, "dim": DIM, "bits": BITS, "k": K, "shards": SHARDS,
        "host_cores": os.cpu_count(), "cores_per_rank": CORES, "lists_read": LISTS_READ,
        "built_gb_s": built_gb_s(), "load_average": os.getloadavg()[0],
        "constants": asdict(constants), "check": check, "billion": project(constants),
    }  # fmt: skip
    print(json.dumps(asdict(constants), indent=1))
    print(*tables(result), sep="\n\n")
    print(record.save(NAME, "cpu", [result], args.folder))


if __name__ == "__main__":
    main()
