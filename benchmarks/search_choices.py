"""What a search leaves out: candidates by errors, two stages; and what ids and drift cost.

    python -m benchmarks.search_choices vectors.npy [--queries 150] [--only PATTERN]

Vectors are raw or .npy float32 rows of 384. One thread, flat indexes, recall@10 against exact
inner products, CPU time.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import RESULTS, environment, put_row
from quantforge.vectordb import IndexConfig, QuantizedIndex
from quantforge.vectordb.drift import Monitor
from quantforge.vectordb.ids import Ids
from quantforge.vectordb.querying import plan_of
from quantforge.vectordb.rows import Growing
from quantforge.vectordb.two_stage import survivors

OUT = RESULTS / "search_choices_cpu.jsonl"
DIM, K = 384, 10
CODES = [("adapted", 4), ("centred", 3), ("adapted", 2), ("adapted", 1), ("centred", 5)]
RECALLS = (0.99, 0.999)
FACTOR = 4
"""Candidates of a fixed rerank, times k."""
IDS = 500_000


def read(path: Path) -> np.ndarray:
    """Return vectors (n, 384) in random order."""
    x = np.load(path) if path.suffix == ".npy" else np.fromfile(path, np.float32)
    x = x[: x.size // DIM * DIM].reshape(-1, DIM)
    return x[np.random.RandomState(0).permutation(len(x))]


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((found[:, :, None] == wanted[:, None]).any(1).mean())


def seconds(call: Callable[[], Any]) -> float:
    """Return the CPU time of a call: other work on the machine counts less."""
    start = time.process_time()
    call()
    return time.process_time() - start


def candidates(
    index: QuantizedIndex, x: np.ndarray, query: np.ndarray, truth: np.ndarray
) -> dict[str, Any]:
    """Return the recall of candidates, how many there are for each query, and its time alone."""
    row: dict[str, Any] = {"codes alone": recall(index.search(query, K)[0], truth)}
    for target in RECALLS:
        asked = []

        def fetch(ids: np.ndarray, asked: list[int] = asked) -> np.ndarray:
            asked.append(len(ids))
            return x[ids]

        found = [
            index.search(one[None], K, rerank="auto", recall=target, fetch=fetch)[0][0]
            for one in query
        ]
        row[str(target)] = {
            "recall": recall(np.array(found), truth),
            "candidates": sum(asked) / len(query),
            "single ms": single(index, query, rerank="auto", recall=target, fetch=x.__getitem__),
        }
    fixed: dict[str, Any] = {"rerank": FACTOR * K, "fetch": x.__getitem__}
    row["fixed"] = {
        "recall": recall(index.search(query, K, **fixed)[0], truth),
        "candidates": FACTOR * K,
        "single ms": single(index, query, **fixed),
    }
    return row


def stages(index: QuantizedIndex, query: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Return what two stages find and read, against one."""
    core = index._core
    assert core is not None
    whole, _ = index.search(query, K)
    row: dict[str, Any] = {"recall": recall(whole, truth)}
    row["queries/s"] = len(query) / seconds(lambda: index.search(query, K))
    row["single ms"] = single(index, query)
    coded, codec, q = core.rows.coded(slice(None)), core.codec, torch.from_numpy(query)
    full = codec.scores(codec.queries(q), coded)
    for target in RECALLS:
        plan = plan_of(core, K, target)
        found, _ = index.search(query, K, two_stage=target)
        first = plan.stage.scores(codec, q, coded)
        sigma = plan.stage.deviation(codec, q)[:, None] * coded.scales[:, 0].float()
        count = sum(
            len(survivors(first[i], sigma[i], plan.z, K, lambda rows, i=i: full[i, rows])[0])
            for i in range(len(q))
        )
        row[str(target)] = {
            "recall": recall(found, truth),
            "same": recall(found, whole),
            "first stage bytes": plan.stage.nbytes,
            "bytes": codec.row_bytes,
            "read": (plan.stage.nbytes + codec.row_bytes * count / full.numel()) / codec.row_bytes,
            "queries/s": len(query)
            / seconds(lambda target=target: index.search(query, K, two_stage=target)),
            "single ms": single(index, query, two_stage=target),
            "single same": recall(
                np.concatenate([index.search(q[None], K, two_stage=target)[0] for q in query]),
                whole,
            ),
        }
    return row


def single(index: QuantizedIndex, query: np.ndarray, **options: Any) -> float:
    """Return the median CPU time of queries alone, in ms."""
    times = []
    for q in query:
        start = time.process_time()
        index.search(q[None], K, **options)
        times.append(time.process_time() - start)
    return 1e3 * float(np.median(times))


def ids() -> list[dict[str, Any]]:
    """Return bytes and time of a million ids."""
    random = np.random.RandomState(0)
    rows = []
    for name, given in (
        ("rising integers", np.arange(IDS)),
        ("integers in any order", random.permutation(IDS)),
        ("strings of 36 bytes", [f"{i:036x}" for i in random.permutation(IDS)]),
    ):
        keys = Growing(torch.empty(0, dtype=torch.int64))
        held = Ids(keys)
        start = time.perf_counter()
        new = held.check_new(given, IDS)
        keys.append(new.keys)
        held.append(new)
        added = time.perf_counter() - start
        wanted = [given[i] for i in random.randint(0, IDS, 1000).tolist()]
        wanted = list(dict.fromkeys(wanted))
        first = seconds(lambda held=held, wanted=wanted: held.rows_of(wanted))
        later = seconds(lambda held=held, wanted=wanted: held.rows_of(wanted))
        rows.append(
            {
                "ids": name,
                "bytes": (keys.rows.nbytes + held.nbytes) / IDS,
                "add_s": added,
                "first_lookup_s": first,
                "1000_lookups_ms": 1e3 * later,
            }
        )
    return rows


def drift(x: np.ndarray) -> dict[str, Any]:
    """Return how often data that do not drift are said to, and what shift is seen."""
    logging.disable(logging.WARNING)
    alarms, trials, random = 0, 40, np.random.RandomState(1)
    for _ in range(trials):
        chosen = torch.from_numpy(x[random.randint(0, len(x), 5000)])
        monitor = Monitor(DIM, int(random.randint(1 << 31)))
        monitor.learn(chosen[:2000])
        for batch in chosen[2000:].split(1000):
            monitor.add(batch)
        alarms += monitor._warned
    seen = {}
    for size in (0.01, 0.02, 0.04, 0.08):
        monitor = Monitor(DIM, 0)
        monitor.learn(torch.from_numpy(x[:5000]))
        step = size * x.std(0).mean() * random.choice([-1, 1], DIM)
        monitor.add(torch.from_numpy(x[5000:10000] + step.astype(np.float32)))
        report = monitor.report()
        seen[str(size)] = {"mean_z": report.mean_z, "found": report.found}
    logging.disable(logging.NOTSET)
    return {"trials": trials, "false alarms": alarms, "shift in standard deviations": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--queries", type=int, default=150)
    parser.add_argument("--only", default="", help="regular expression of cases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = read(options.vectors)
    query, x = x[: options.queries], x[options.queries :]
    truth = (torch.from_numpy(query) @ torch.from_numpy(x).T).topk(K).indices.numpy()
    where = {**environment("cpu"), "vectors": len(x), "queries": len(query)}

    def keep(case: str, measure: Callable[[], Any]) -> None:
        if re.search(options.only, case):
            row = measure()
            print(case, row, flush=True)
            put_row(OUT, {"case": case, "environment": where, "found": row})

    keep("drift", lambda: drift(x))
    keep("ids", ids)
    for mode, bits in CODES:
        index = QuantizedIndex(DIM, IndexConfig(bits=bits, mode=mode, nlist=0))
        index.add(x)
        keep(f"two stages {mode} {bits}", partial(stages, index, query, truth))
        keep(f"rerank {mode} {bits}", partial(candidates, index, x, query, truth))


if __name__ == "__main__":
    main()
