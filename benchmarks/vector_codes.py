"""What the codes of an index keep: recall and bytes of each mode, errors, and the worth of lists.

    python -m benchmarks.vector_codes codes out/minilm.npy.part
    python -m benchmarks.vector_codes lists out/minilm.npy.part
    python -m benchmarks.vector_codes routes out/minilm.npy.part
    python -m benchmarks.vector_codes isotropic

Vectors are a raw float32 file or a .npy (--dim columns); the last ones are the queries. Isotropic
ones are normal, 6000 of each dim.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import RESULTS, environment
from quantforge.numerics.vectors import Mode
from quantforge.vectordb import IndexConfig, QuantizedIndex, learning
from quantforge.vectordb.learning import learn_partition

NEIGHBOURS = 10


def vectors_of(path: Path, dim: int) -> torch.Tensor:
    """Return the rows that are there."""
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path))
    raw = np.fromfile(path, np.float32)
    return torch.from_numpy(raw[: len(raw) // dim * dim].reshape(-1, dim))


def recall(found: np.ndarray, truth: torch.Tensor) -> float:
    """Return the share of true neighbours (q, k) among those found."""
    return float((torch.from_numpy(found)[:, :, None] == truth[:, None]).any(1).float().mean())


def codes(x: torch.Tensor, query: torch.Tensor, bits: list[int], modes: list[Mode]) -> list[dict]:
    """Return recall, bytes, bias and calibration of flat indexes."""
    truth = (query @ x.T).topk(NEIGHBOURS).indices
    rows = []
    for mode in modes:
        for b in bits:
            index = QuantizedIndex(x.shape[1], IndexConfig(bits=b, mode=mode, nlist=0))
            index.add(x)
            ids, _ = index.search(query, NEIGHBOURS)
            some = np.arange(0, len(x), max(1, len(x) // 500))
            exact = (query @ x[some].T).numpy()
            whole = index._known
            seen = whole.codec.queries(query)
            at = index._rows_of(some)
            guess = (whole.codec.scores(seen, whole.rows.coded(at)) + seen.base).numpy()
            error = index.standard_errors(query, some)
            rows.append(
                {
                    "mode": mode,
                    "bits": b,
                    "bytes": whole.codec.row_bytes,
                    "recall": round(recall(ids, truth), 4),
                    "bias": float(f"{(guess - exact).mean():.2e}"),
                    "rms_error": float(f"{np.sqrt(np.square(guess - exact).mean()):.2e}"),
                    "error_ratio": round(
                        float(np.sqrt(np.square(guess - exact).mean() / np.square(error).mean())), 3
                    ),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def lists(x: torch.Tensor, query: torch.Tensor, bits: list[int]) -> list[dict]:
    """Return recall by nprobe of an index with lists, its codes of residuals or of vectors."""
    truth = (query @ x.T).topk(NEIGHBOURS).indices
    rows = []
    for b in bits:
        for kind in ("residuals", "vectors"):
            index = QuantizedIndex(x.shape[1], IndexConfig(bits=b))
            start = time.perf_counter()
            if kind == "residuals":
                index.add(x)
            else:
                for part in x.split(max(5000, len(x) // 8)):
                    index.add(part)
            built = time.perf_counter() - start
            full, _ = index.search(query, NEIGHBOURS, nprobe=index.nlist)
            found, _ = index.search(query, NEIGHBOURS)
            chosen, curve = index.nprobe, index._known.partition.curve
            row: dict[str, Any] = {
                "bits": b,
                "codes_of": kind,
                "nlist": index.nlist,
                "imbalance": round(float(index.list_report()["imbalance"]), 3),
                "build_s": round(built, 2),
                "recall_all_lists": round(recall(full, truth), 4),
                "default_nprobe": chosen,
                "default_expects": round(float(curve[chosen - 1]), 4),
                "default_finds_of_full_scan": round(recall(found, torch.from_numpy(full)), 4),
            }
            own = index.calibrate(0.95)
            found, _ = index.search(query, NEIGHBOURS)
            row |= {
                "calibrated_nprobe": own.nprobe,
                "calibrated_finds_of_full_scan": round(recall(found, torch.from_numpy(full)), 4),
                "recall_calibrated": round(recall(found, truth), 4),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def routes(x: torch.Tensor, query: torch.Tensor, nlist: int = 256) -> list[dict]:
    """Return the share of neighbours in the lists looked into, by centroids alone and as it is.

    Codes play no part; seeds draw other centroids.
    """
    truth = (query @ x.T).topk(NEIGHBOURS).indices
    rows = []
    for seed in range(6):
        config = IndexConfig(bits=4, nlist=nlist, seed=seed)
        partition = learn_partition(config, x, nlist, coded=True)
        labels = partition.nearest(x)
        for kind, found in (
            ("centroids", learning.routes("ip", query, partition.centroids)),
            ("spreads too", learning.list_routes("ip", query, partition)),
        ):
            order = found.argsort(1, descending=True)
            rank = order.argsort(1).gather(1, labels[truth])
            looked = torch.bincount(labels, minlength=nlist)[order].float().mean(0).cumsum(0)
            row: dict[str, Any] = {"seed": seed, "nlist": nlist, "by": kind}
            for nprobe in (8, 32):
                row[f"finds_{nprobe}"] = round(float((rank < nprobe).float().mean()), 4)
                row[f"rows_{nprobe}"] = round(float(looked[nprobe - 1]))
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["codes", "lists", "routes", "isotropic"])
    parser.add_argument("vectors", type=Path, nargs="?")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=RESULTS / "vector_codes.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    rows = []
    if args.part == "isotropic":
        generator = torch.Generator().manual_seed(0)
        for dim in (384, 768, 1536):
            x = torch.randn(6000, dim, generator=generator)
            query = torch.randn(500, dim, generator=generator)
            shape = {"n": len(x), "dim": dim, "queries": len(query)}
            rows += [shape | row for row in codes(x, query, [1, 2, 4], ["centred", "adapted"])]
    else:
        every = vectors_of(args.vectors, args.dim)
        x, query = every[: -args.queries], every[-args.queries :]
        shape = {"n": len(x), "dim": args.dim, "queries": len(query)}
        if args.part == "codes":
            measured = codes(x, query, [1, 2, 3, 4, 8], ["oblivious", "centred", "adapted"])
        elif args.part == "routes":
            measured = routes(x, query)
        else:
            measured = lists(x, query, [2, 4])
        rows = [shape | row for row in measured]
    found[args.part] = {"environment": environment("cpu"), "rows": rows}
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
