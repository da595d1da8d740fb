"""The fewest bytes for vectors at a recall that is asked for.

Measures codes and indexes on a sample of a file (.npy, (n, dim) floats), prints those that no other
beats in recall and bytes, and saves the recommended ones. Asserted: what is recommended has the
recall that was asked for, in fewer bytes than float16, and an index made from the file has the
recall that was measured.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from quantforge.optimizer import Space, optimize
from quantforge.vectordb import IndexConfig, QuantizedIndex


def loud_and_quiet(n: int, dim: int, seed: int) -> np.ndarray:
    """Return vectors whose variance falls with the direction, as that of embeddings does."""
    random = np.random.RandomState(seed)
    turn = np.linalg.qr(random.standard_normal((dim, dim)))[0]
    loud = np.geomspace(1, 0.03, dim)
    return ((random.standard_normal((n, dim)) * loud) @ turn + 0.1).astype(np.float32)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("input", nargs="?", type=Path, help=".npy of shape (n, dim)")
    parser.add_argument("--recall", type=float, default=0.9, help="recall@10 to reach")
    parser.add_argument("--metric", choices=("ip", "cosine", "l2"), default="ip")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="make the data; seconds on a CPU")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir(), "vectors.json"))
    args = parser.parse_args(argv)
    if args.small == (args.input is not None):
        parser.error("give an input file or --small")
    if args.small:
        x = loud_and_quiet(2000, 64, args.seed)
        space = Space(bits=(2, 3, 4, 5, 6), rotation=("hadamard",), codebook=("lloyd_max",))
    else:
        x, space = np.load(args.input, mmap_mode="r"), Space()

    result = optimize(
        x,
        objective="bytes",
        min_accuracy=args.recall,
        metric=args.metric,
        space=space,
        stored=1_000_000,  # what an index learns is shared by as many
        device=args.device,
        seed=args.seed,
    )
    print(result)
    for choice in result.choices.values():
        point = choice.recommended
        assert point.accuracy("recall", "choice").mean() >= args.recall, "less than asked for"
        assert point.bytes_per_vector < 2 * x.shape[1], "no smaller than float16"

    result.config.save(args.output)
    # one list, as it was measured: those of a large index are another choice, of nprobe
    config, sample = replace(IndexConfig.from_file(args.output), nlist=0), result.sample
    index = QuantizedIndex(x.shape[1], config)
    index.add(sample.base)
    found, _ = index.search(sample.queries, sample.k)
    recall = sample.recall(torch.from_numpy(found)).mean()
    measured = result.choices["index"].recommended.recall
    print(f"\n{args.output}: an index of its settings has recall@{sample.k} {recall:.4f}")
    assert abs(recall - measured) < 1e-9, f"measured was {measured}"


if __name__ == "__main__":
    main()
