"""A million real vectors in one run: our indexes on the CPU and on the GPU, and FAISS's on the CPU.

    python -m benchmarks.search_million /tmp/minilm_1m.npy [--device cuda] [--seconds 240]

Of the .npy file (n, dim) the last 1,000 vectors are the queries and the 256 before them choose
`nprobe`; all others are stored. Neighbours are exact inner products. Indexes with lists look into
as few lists as hold 95% of what a scan of all their lists finds for those 256. All of the CPU's
threads build; searches are timed with one thread, in CPU time, and with all, by the clock. What is
held is what the anonymous memory of the process, or what is allocated on the GPU, shrinks by when
the index goes. Rows go to `results/search_million_<device>.jsonl` as they are measured, the
important ones first, until the time is over.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.record import RESULTS, environment, put_row
from benchmarks.search_gpu import best_of, share
from benchmarks.vector_search import versions
from quantforge.vectordb import IndexConfig, QuantizedIndex

K, QUERIES, OTHERS, TARGET = 10, 1000, 256, 0.95
SAMPLE = 174_762
"""Vectors that every index learns from: those of 256 MiB at 384 numbers."""
BATCH_SECONDS, SINGLE_SECONDS, SINGLES = 1.0, 0.7, 50
PART = 1 << 18
WARM_ROWS = {"cpu": 1 << 13, "cuda": 1 << 16}
"""On a GPU enough for as many lists as a million vectors are given."""
ON_GPU = ("codes", "scales", "learned", "lists")
"""Parts of the report that follow the codes; the others stay in main memory."""


class Index(Protocol):
    """An index that is ready.

    Attributes:
        code_bytes: of a vector's code and numbers.
        nlist: its lists; 1 is a scan of all.
        reported: bytes that it says it holds, on its GPU if it has one; None if it says nothing.
    """

    code_bytes: float
    nlist: int
    reported: int | None

    def search(self, queries: np.ndarray, nprobe: int | None) -> np.ndarray:
        """Return the rows (q, K) found in so many lists."""


@dataclass(frozen=True)
class Case:
    """An index to build.

    Attributes:
        name: of the row.
        bits: a number.
        device: where it is.
        build: makes it of vectors (n, dim).
    """

    name: str
    bits: float
    device: str
    build: Callable[[np.ndarray], Index]


class Ours:
    """A `QuantizedIndex`."""

    def __init__(self, x: np.ndarray, bits: int, nlist: int, device: str) -> None:
        self._index = QuantizedIndex(x.shape[1], IndexConfig(bits=bits, nlist=nlist)).to(device)
        self._index.add_from(x)
        core = self._index._core
        assert core is not None
        self.code_bytes, self.nlist = float(core.codec.row_bytes), self._index.nlist

    @property
    def reported(self) -> int:
        report = self._index.memory_report()
        if self._index.device.type == "cpu":
            return report["total"]
        return sum(report[name] for name in ON_GPU)

    def search(self, queries: np.ndarray, nprobe: int | None) -> np.ndarray:
        return self._index.search(queries, K, nprobe=nprobe)[0]


class Dense:
    """The vectors in bf16 on the GPU: matmul and topk."""

    nlist = 1

    def __init__(self, x: np.ndarray, device: str) -> None:
        self._rows = torch.empty(x.shape, dtype=torch.bfloat16, device=device)
        for start in range(0, len(x), PART):
            self._rows[start : start + PART] = torch.from_numpy(x[start : start + PART].copy())
        self.code_bytes, self.reported = 2.0 * x.shape[1], self._rows.nbytes

    def search(self, queries: np.ndarray, nprobe: int | None) -> np.ndarray:
        query = torch.from_numpy(queries).to(self._rows)
        return best_of(iter(self._rows.split(1 << 20)), query).cpu().numpy()


class Faiss:
    """An index of FAISS's factory; lists are learned by its k-means from the same sample."""

    reported = None

    def __init__(self, x: np.ndarray, key: str, nlist: int) -> None:
        import faiss

        dim, metric = x.shape[1], faiss.METRIC_INNER_PRODUCT
        self._index = faiss.index_factory(dim, f"IVF{nlist},{key}" if nlist else key, metric)
        chosen = np.random.RandomState(0).choice(len(x), min(len(x), SAMPLE), replace=False)
        self._index.train(x[np.sort(chosen)])
        self._index.add(x)
        self._lists = faiss.extract_index_ivf(self._index) if nlist else None
        self.nlist = nlist or 1
        self.code_bytes = self._index.code_size

    def search(self, queries: np.ndarray, nprobe: int | None) -> np.ndarray:
        if self._lists is not None:
            self._lists.nprobe = nprobe
        return self._index.search(queries, K)[1]


def cases(nlist: int, gpu: str | None) -> Iterator[Case]:
    """Yield all indexes, the important ones first.

    Args:
        nlist: lists of those that have some.
        gpu: the device that is compared with the CPU, or None.
    """
    faiss = importlib.util.find_spec("faiss") is not None

    def ours(bits: int, lists: int, device: str = "cpu") -> Case:
        name = f"quantforge {bits} bits" + (f", {lists} lists" if lists else "")
        return Case(name, bits, device, partial(Ours, bits=bits, nlist=lists, device=device))

    def theirs(key: str, bits: float, lists: int = 0) -> Iterator[Case]:
        if faiss:
            name = f"FAISS {key}" + (f", {lists} lists" if lists else "")
            yield Case(name, bits, "cpu", partial(Faiss, key=key, nlist=lists))

    yield ours(4, 0)
    yield ours(4, nlist)
    if gpu is not None:
        yield Case("bf16 matmul and topk", 16, gpu, partial(Dense, device=gpu))
        yield from (ours(bits, lists, gpu) for bits in (4, 3, 2, 1) for lists in (0, nlist))
    yield from theirs("RaBitQfs4", 4)
    yield from theirs("RaBitQfs4", 4, nlist)
    yield from theirs("Flat", 32)
    yield ours(2, 0)
    yield ours(2, nlist)
    yield from theirs("RaBitQfs2", 2)
    yield from theirs("PQ192x4fs", 2, nlist)
    yield from theirs("PQ192x4fs", 2)
    yield from theirs("SQ4", 4, nlist)
    yield ours(1, 0)
    yield ours(3, 0)
    yield from theirs("RaBitQfs1", 1)
    yield from theirs("RaBitQfs3", 3)
    yield from (ours(bits, nlist) for bits in (1, 3))
    yield from theirs("RaBitQfs2", 2, nlist)


def use_threads(count: int) -> None:
    """Run torch, our library and FAISS with so many threads."""
    torch.set_num_threads(count)
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        faiss.omp_set_num_threads(count)


def held(device: str) -> int:
    """Return the bytes of tensors on the GPU, or of the anonymous memory of this process."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])


def least_nprobe(index: Index, queries: np.ndarray) -> int:
    """Return the least number of lists, to an eighth, that holds TARGET of what all hold."""
    whole = index.search(queries, index.nlist)

    def is_enough(nprobe: int) -> bool:
        return share(index.search(queries, nprobe), whole) >= TARGET

    low, high = 0, 8
    while high < index.nlist and not is_enough(high):
        low, high = high, 2 * high
    high = min(high, index.nlist)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def batch_qps(
    search: Callable[[np.ndarray], Any], queries: np.ndarray, clock: Callable[[], float]
) -> float:
    """Return queries a second of a batch: the best of three that fit the time."""
    best, end = float("inf"), time.perf_counter() + BATCH_SECONDS
    for _ in range(3):
        start = clock()
        search(queries)
        best = min(best, clock() - start)
        if time.perf_counter() > end:
            break
    return len(queries) / best


def single_ms(
    search: Callable[[np.ndarray], Any], queries: np.ndarray, clock: Callable[[], float]
) -> float:
    """Return the median time of a query alone, each another one."""
    times, end = [], time.perf_counter() + SINGLE_SECONDS
    search(queries[:1])
    for i in range(SINGLES):
        start = clock()
        search(queries[i : i + 1])
        times.append(1e3 * (clock() - start))
        if time.perf_counter() > end and len(times) >= 5:
            break
    return statistics.median(times)


def warm_up(case: Case, x: np.ndarray, queries: np.ndarray) -> None:
    """Take work space, and compile what runs on a GPU, by a small index of the same kind."""
    if case.name.startswith("quantforge"):
        index = case.build(x[: WARM_ROWS[case.device]])
        for some in (queries, queries[:1]):
            index.search(some, None)


def measure(
    case: Case, x: np.ndarray, queries: np.ndarray, others: np.ndarray, truth: np.ndarray
) -> dict[str, Any]:
    """Build an index and return its row."""
    threads = os.cpu_count() or 1
    use_threads(threads)
    warm_up(case, x, queries)
    start = time.perf_counter()
    index = case.build(x)
    row: dict[str, Any] = {"build_s": time.perf_counter() - start}
    nprobe = least_nprobe(index, others) if index.nlist > 1 else None
    search = partial(index.search, nprobe=nprobe)
    row |= {"recall": share(search(queries), truth), "nlist": index.nlist, "nprobe": nprobe}
    if index.nlist > 1:
        parts = np.array_split(queries, 4)  # as many visits as for the others
        whole = [index.search(part, index.nlist) for part in parts]
        row["recall_of_all_lists"] = share(np.concatenate(whole), truth)
    row |= {"code_bytes": index.code_bytes, "bits": case.bits, "on": case.device}
    row["qps"] = batch_qps(search, queries, time.perf_counter)
    row["single_ms"] = single_ms(search, queries, time.perf_counter)
    if case.device == "cpu":
        use_threads(1)
        some = queries[: int(min(len(queries), max(32, row["qps"] / threads * BATCH_SECONDS)))]
        row["qps_1_thread"] = batch_qps(search, some, time.process_time)
        row["single_ms_1_thread"] = single_ms(search, queries, time.process_time)
    row["reported"], before = index.reported, held(case.device)
    del index, search  # nothing else may hold it
    row["held"] = before - held(case.device)
    return row


def main(arguments: list[str] | None = None) -> Path:
    """Measure what there is time for, and return the file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vectors", type=Path, help=".npy file of float32 (n, dim), normalized")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--nlist", type=int, help="lists; about 2 sqrt(n) by default")
    parser.add_argument("--only", default="", help="regular expression of names")
    parser.add_argument("--seconds", type=float, default=240, help="begin no index after so long")
    parser.add_argument("--commit", help="of a copy without history")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    rows = np.load(options.vectors, mmap_mode="r")
    x = np.ascontiguousarray(rows[: -QUERIES - OTHERS], np.float32)
    others, queries = np.array(rows[len(x) : -QUERIES]), np.array(rows[-QUERIES:])
    nlist = options.nlist or IndexConfig().lists_for(len(x))
    use_threads(os.cpu_count() or 1)
    parts = (
        torch.from_numpy(x[start : start + PART].copy()).to(options.device)
        for start in range(0, len(x), PART)
    )
    truth = best_of(parts, torch.from_numpy(queries).to(options.device)).cpu().numpy()
    where = {**environment("cpu", options.commit), **versions()}
    if options.device == "cuda":
        where["gpu"] = torch.cuda.get_device_name()
    told = options.vectors.with_suffix(".json")
    shared = {"n": len(x), "dim": x.shape[1], "queries": QUERIES, "k": K, "environment": where}
    shared["text"] = json.loads(told.read_text()) if told.exists() else None
    out = options.out / f"search_million_{options.device}.jsonl"
    gpu = options.device if options.device != "cpu" else None
    for case in cases(nlist, gpu):
        name = f"{case.name}, {case.device.upper()}"
        if not re.search(options.only, name):
            continue
        if time.perf_counter() - begin > options.seconds:
            print(f"{name:42} left out: the time is over", flush=True)
            continue
        row = measure(case, x, queries, others, truth)
        put_row(out, {"case": name, **row, **shared})
        spent = time.perf_counter() - begin
        said = " ".join(
            f"{key} {value:.4g}" for key, value in row.items() if key in SHOWN and value
        )
        print(f"{spent:4.0f} s {name:42} {said}", flush=True)
    return out


SHOWN = ("recall", "nprobe", "build_s", "held", "reported", "qps", "single_ms", "qps_1_thread",
         "single_ms_1_thread")  # fmt: skip


if __name__ == "__main__":
    main()
