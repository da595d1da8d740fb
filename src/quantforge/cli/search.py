"""Find the nearest vectors: in an index, or in a compressed file.

  quantforge search shelf queries.npy -k 10
  quantforge search compressed.npz queries.npy -k 10 --json

Printed is a line for each result: query, rank, id, score; with --json a line for each query.
Queries are read a few at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantforge.cli.common import (
    CommandError,
    add_compute,
    add_force,
    add_input,
    add_json,
    check_new,
    device_of,
    path_ending_in,
    share,
    whole,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    Search = Callable[[Any], tuple[np.ndarray, np.ndarray]]

SUMMARY = "find the nearest vectors in an index or a compressed file"
QUERIES_AT_A_TIME = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("index", metavar="INDEX",
                        help="folder or file of an index, or what compress wrote")  # fmt: skip
    add_input(parser, dest="queries", what="file of queries, like the INPUT of compress")
    parser.add_argument("-k", type=whole(1), default=10, help="results for a query")
    parser.add_argument("--rerank", type=whole(1), metavar="M",
                        help="take M by codes, the best of them by the vectors kept")  # fmt: skip
    parser.add_argument("--nprobe", type=whole(1), help="lists to look into")
    parser.add_argument("--recall", type=share, help="look into lists that reach this share")
    parser.add_argument("--where", type=_json, metavar="JSON",
                        help='filter on metadata, {"year": {"gte": 2020}}')  # fmt: skip
    parser.add_argument("-o", "--output", type=path_ending_in(".npz"),
                        help="write ids and scores there instead")  # fmt: skip
    add_compute(parser, seed=False)
    add_force(parser)
    add_json(parser)


def _json(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Search and print."""
    check_new(args.output, args.force)
    device = device_of(args)
    from quantforge.inputs import open_vectors

    search = _searching(args, device)
    queries = open_vectors(args.queries, name=args.name)
    if queries.ndim != 2:
        raise CommandError(f"queries must have shape (q, dim); got {tuple(queries.shape)}")
    results = _results(search, queries)
    if args.output is not None:
        _save(args.output, results)
        return 0
    for start, ids, scores in results:
        _print(args.json, start, ids, scores)
    return 0


def _searching(args: argparse.Namespace, device: torch.device) -> Search:
    """Return the function that answers queries."""
    from quantforge.cli.shelf import is_index, reading

    options = {name: getattr(args, name) for name in ("rerank", "nprobe", "recall", "where")}
    given = {name: value for name, value in options.items() if value is not None}
    if is_index(args.index):
        if device.type != "cpu":
            raise CommandError("an index is searched on the CPU; --device is for compressed files")
        index = reading(args.index)
        return lambda queries: index.search(queries, args.k, **given)
    if given:
        raise CommandError(f"{args.index} is no index, and --{min(given)} is for one")
    return _in_codes(args, device)


def _in_codes(args: argparse.Namespace, device: torch.device) -> Search:
    from quantforge.arrays import as_tensor
    from quantforge.ops.search.api import search
    from quantforge.pipeline import quantized_in

    if Path(args.index).is_dir():
        raise CommandError(f"the folder {args.index} is no index")
    q: Any = quantized_in(args.index).to(device)
    if q.ndim != 2 or args.k > len(q):
        raise CommandError(
            f"{args.index} must hold (n, dim), at least k={args.k} vectors; got {tuple(q.shape)}"
        )

    def run(queries: Any) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = search(
            as_tensor(queries).to(device), q.packed, q.scales, q.spec, args.k,
            shift=q.shift, equalizer=q.equalizer,
        )  # fmt: skip
        return rows.cpu().numpy(), scores.cpu().float().numpy()

    return run


def _results(search: Search, queries: Any) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for start in range(0, len(queries), QUERIES_AT_A_TIME):
        yield start, *search(queries[start : start + QUERIES_AT_A_TIME])


def _print(as_json: bool, start: int, ids: np.ndarray, scores: np.ndarray) -> None:
    import json

    for i, (row, values) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True), start):
        # places that a filter left empty hold -1 or None, and an infinite score
        found = [pair for pair in zip(row, values, strict=True) if pair[0] not in (-1, None)]
        if as_json:
            print(json.dumps({"query": i, "ids": [f[0] for f in found],
                              "scores": [f[1] for f in found]}))  # fmt: skip
        else:
            for rank, (name, score) in enumerate(found, 1):
                print(f"{i}\t{rank}\t{name}\t{score:.6g}")


def _save(path: Path, results: Iterator[tuple[int, np.ndarray, np.ndarray]]) -> None:
    import numpy as np

    from quantforge.io.atomic import replacing

    found = list(results)
    ids = np.concatenate([part[1] for part in found])
    if ids.dtype == object:  # strings; None where a filter left too few
        ids = np.where(ids == None, "", ids).astype(str)  # noqa: E711
    scores = np.concatenate([part[2] for part in found])
    with replacing(path) as file:
        np.savez(file, ids=ids, scores=scores)
