"""An index on a GPU: latency, throughput, recall, build time and memory.

    python -m benchmarks.search_gpu [vectors.npy ...] [--rows 1000000 10000000] [--bits 4]
    python -m benchmarks.search_gpu --small          a few thousand rows, on the CPU if need be

Synthetic rows lie in clusters and are loud in some directions, as embeddings are; they are made on
the device, a part at a time. A .npy file is (n, dim) float32, of which the last 1024 rows are the
queries. Each case has a flat index and one with lists, and, as the baseline, bf16 rows: matmul and
topk, a part of the rows at a time. Times are those of whole calls, results in main memory.
IVF looks into as many lists as find 95% of what a full scan of the same codes finds, by
`calibrate` on other queries. Rows go to `results/search_gpu_<device>.jsonl`.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ceiling import ceilings
from benchmarks.record import RESULTS, environment, median_ms, put_row, slug
from quantforge.vectordb import IndexConfig, QuantizedIndex

K, QUERIES, TARGET = 10, 1024, 0.95
PART = 1 << 18
TRAINED = 2
"""Parts that an index learns from."""
BASELINE_PART = 1 << 20
EXACT_QUERIES = 256
"""Queries whose exact neighbours are known."""


@dataclass(frozen=True)
class Data:
    """Rows that come in parts, and queries.

    Attributes:
        name: of the case.
        n: rows.
        parts: returns them anew, (part, dim) float32 on the device.
        queries: (QUERIES, dim).
        others: (q, dim), to calibrate with.
    """

    name: str
    n: int
    parts: Callable[[], Iterator[torch.Tensor]]
    queries: torch.Tensor
    others: torch.Tensor


def synthetic(n: int, dim: int, device: torch.device, part: int = PART) -> Data:
    """Return normalized rows around n / 500 centres, with a spectrum that falls."""

    def normal(count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(count, dim, generator=generator, device=device)

    spread = torch.arange(1, dim + 1, device=device) ** -0.5
    centres = normal(max(n // 500, 8), 1) * spread

    def rows(count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        which = torch.randint(len(centres), (count,), generator=generator, device=device)
        x = centres[which] + 0.7 * spread * normal(count, seed + 1)
        return torch.nn.functional.normalize(x, dim=-1)

    def parts() -> Iterator[torch.Tensor]:
        for start in range(0, n, part):
            yield rows(min(part, n - start), 10 + 2 * start)

    return Data(f"synthetic {n} x {dim}", n, parts, rows(QUERIES, 3), rows(QUERIES, 5))


def of_file(path: Path, device: torch.device) -> Data:
    """Return the rows of a .npy file."""
    x = np.load(path, mmap_mode="r")
    n = len(x) - 2 * QUERIES

    def read(start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(np.array(x[start:stop], np.float32)).to(device)

    def parts() -> Iterator[torch.Tensor]:
        for start in range(0, n, PART):
            yield read(start, min(start + PART, n))

    queries, others = read(n, n + QUERIES), read(n + QUERIES, len(x))
    return Data(f"{path.stem} {n} x {x.shape[1]}", n, parts, queries, others)


def share(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the share of wanted ids (q, k) that are found."""
    return float((found[:, :, None] == wanted[:, None]).any(1).mean())


def best_of(parts: Iterator[torch.Tensor], query: torch.Tensor) -> torch.Tensor:
    """Return the rows (q, K) with the greatest inner products, a part at a time."""
    scores = query.new_full((len(query), K), -torch.inf)
    rows, start = torch.zeros(scores.shape, dtype=torch.int64, device=query.device), 0
    for part in parts:
        new, place = (query @ part.T).topk(K)
        scores, order = torch.cat([scores, new], 1).topk(K)
        rows = torch.cat([rows, place + start], 1).gather(1, order)
        start += len(part)
    return rows


def allocated(device: torch.device) -> int:
    """Return the bytes that tensors hold on the device; 0 on the CPU, which does not say."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def build(data: Data, config: IndexConfig, device: torch.device) -> tuple[QuantizedIndex, Any]:
    """Return an index of all rows, with the time it took and the memory it holds."""
    index = QuantizedIndex(data.queries.shape[1], config).to(device)
    (data.queries.double() @ data.queries.double().T, data.queries @ data.queries.T)  # workspaces
    before, learning, adding = allocated(device), 0.0, 0.0
    parts = data.parts()
    sample = [part for part, _ in zip(data.parts(), range(TRAINED), strict=False)]
    start = time.perf_counter()
    index.train(sample, data.n)
    learning = time.perf_counter() - start
    del sample
    for part in parts:
        start = time.perf_counter()
        index.add(part)
        adding += time.perf_counter() - start
    report = index.memory_report()
    there = sum(report[name] for name in ("codes", "scales", "learned", "lists"))
    del part
    held = allocated(device) - before
    row = {"train_s": learning, "add_s": adding, "report": report, "nlist": index.nlist}
    if device.type == "cuda":
        row |= {"allocated": held, "reported": there, "off": there / held - 1}
    return index, row


def searched(
    index: QuantizedIndex, data: Data, truth: np.ndarray, device: str, nprobe: int | None
) -> dict[str, Any]:
    """Return times of one query and of all, and the recall."""
    queries = data.queries

    def search(count: int) -> np.ndarray:
        return index.search(queries[:count], K, nprobe=nprobe)[0]

    return {
        "recall": share(search(len(truth)), truth),
        "one_ms": median_ms(lambda: search(1), device),
        "batch_ms": median_ms(lambda: search(QUERIES), device, repeats=3),
    }


def baseline(data: Data, truth: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Return times of the uncompressed rows in bf16."""
    dim = data.queries.shape[1]
    rows = torch.empty(data.n, dim, dtype=torch.bfloat16, device=device)
    start = 0
    for part in data.parts():
        rows[start : start + len(part)] = part
        start += len(part)
    queries = data.queries.to(torch.bfloat16)

    def search(count: int) -> np.ndarray:
        return best_of(iter(rows.split(BASELINE_PART)), queries[:count]).cpu().numpy()

    return {
        "recall": share(search(len(truth)), truth),
        "one_ms": median_ms(lambda: search(1), device.type),
        "batch_ms": median_ms(lambda: search(QUERIES), device.type, repeats=3),
        "bytes": rows.nbytes,
    }


def measure(data: Data, bits: int, device: torch.device, nlist: int | None) -> dict[str, Any]:
    """Return all that is measured of one set of rows."""
    truth = best_of(data.parts(), data.queries[:EXACT_QUERIES]).cpu().numpy()
    row: dict[str, Any] = {"bf16": baseline(data, truth, device)}
    flat, row["flat"] = build(data, IndexConfig(bits=bits, nlist=0), device)
    row["flat"] |= searched(flat, data, truth, device.type, None)
    core = flat._core
    assert core is not None
    row["flat"]["read_gb"] = data.n * core.codec.row_bytes / 1e9
    del core, flat
    lists, row["lists"] = build(data, IndexConfig(bits=bits, nlist=nlist), device)
    start = time.perf_counter()
    found = lists.calibrate(TARGET, K, data.others[:EXACT_QUERIES])
    row["lists"] |= {"calibrate_s": time.perf_counter() - start, "nprobe": found.nprobe}
    row["lists"] |= searched(lists, data, truth, device.type, None)
    whole = lists.search(data.queries[: len(truth)], K, nprobe=lists.nlist)[0]
    row["lists"]["of full scan"] = share(lists.search(data.queries[: len(truth)], K)[0], whole)
    row["lists"]["full scan recall"] = share(whole, truth)
    for name in ("one_ms", "batch_ms"):
        row[f"lists against flat, {name}"] = row["flat"][name] / row["lists"][name]
        row[f"flat against bf16, {name}"] = row["bf16"][name] / row["flat"][name]
    return row


def main(arguments: list[str] | None = None) -> Path:
    """Measure what is asked for, and return the file of results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vectors", type=Path, nargs="*")
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", help="of a copy without history")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--small", action="store_true", help="6000 rows of 64")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.small:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sets = [synthetic(6000, 64, device, 1500)]
    else:
        sets = [synthetic(n, options.dim, device) for n in options.rows]
        sets += [of_file(path, device) for path in options.vectors]
    out = options.out / f"search_gpu_{slug(device.type)}.jsonl"
    where = environment(device.type, options.commit)
    read = ceilings(device, 1 << 24 if options.small else None)["read_gbps"]
    for data in sets:
        start = time.perf_counter()
        found = measure(data, options.bits, device, 32 if options.small else None)
        found["flat"]["share of read ceiling"] = (
            found["flat"]["read_gb"] / found["flat"]["one_ms"] * 1e3 / read
        )
        found["seconds"] = time.perf_counter() - start
        case = f"{data.name}, {options.bits} bits"
        print(case, found, flush=True)
        put_row(out, {"case": case, "environment": where, "read_gbps": read, "found": found})
    return out


if __name__ == "__main__":
    main()
