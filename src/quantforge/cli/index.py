"""Make an index of vectors, and keep it up to date.

  quantforge index build vectors.npy shelf --bits 4
  quantforge index add shelf more.npy
  quantforge search shelf queries.npy -k 10

An index is a folder whose changes are safe against crashes, or one file if its name ends in
.safetensors. Vectors may be larger than memory; what is learned of them comes from a sample.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantforge.cli.common import (
    BITS,
    LOG,
    CommandError,
    add_force,
    add_input,
    add_json,
    check_new,
    emit,
    share,
    size,
    whole,
)

if TYPE_CHECKING:
    from quantforge.vectordb import IndexConfig

SUMMARY = "make and change an index of vectors: build, add, remove, stats, calibrate"
CONFIG = ("bits", "mode", "metric", "nlist", "originals", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, (action, declare, summary) in ACTIONS.items():
        sub = commands.add_parser(name, help=summary, description=f"{summary}.".capitalize())
        sub.set_defaults(action_run=action)
        declare(sub)
        add_json(sub)
        sub.add_argument("--threads", type=whole(1), help="of the CPU (default: torch's)")


def run(args: argparse.Namespace) -> int:
    """Run one of the actions."""
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    code: int = args.action_run(args)
    return code


def _declare_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder or .safetensors file")


def _declare_vectors(parser: argparse.ArgumentParser) -> None:
    add_input(parser)
    parser.add_argument("--ids", type=Path, metavar="FILE",
                        help=".npy, or text with one id a line (default: numbers)")  # fmt: skip
    parser.add_argument("--metadata", type=Path, metavar="FILE",
                        help="a JSON object a line, or .parquet, .arrow")  # fmt: skip


def _declare_build(parser: argparse.ArgumentParser) -> None:
    _declare_vectors(parser)
    _declare_index(parser)
    parser.add_argument("--config", type=Path, help="settings file, as `optimize` writes one")
    parser.add_argument("--bits", type=BITS, help="bits per number, 1-8 (default: 4)")
    parser.add_argument("--mode", choices=("adapted", "centred", "oblivious"),
                        help="what is learned of the data (default: adapted)")  # fmt: skip
    parser.add_argument("--metric", choices=("ip", "cosine", "l2"), help="(default: ip)")
    parser.add_argument("--nlist", type=whole(0), help="lists; 0: none (default: by the size)")
    parser.add_argument("--originals", choices=("none", "float16"),
                        help="keep the vectors too, for search --rerank")  # fmt: skip
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), help="of rotations (default: 0)")
    parser.add_argument("--train-rows", type=whole(2), default=100_000,
                        help="vectors that are learned from")  # fmt: skip
    add_force(parser)


def build(args: argparse.Namespace) -> int:
    """Make an index from a file of vectors."""
    from quantforge.cli.shelf import add_all, creating
    from quantforge.inputs import open_vectors
    from quantforge.vectordb import QuantizedIndex

    check_new(args.index, args.force)
    config, labels = _config(args), _labels(args)
    array = open_vectors(args.input, name=args.name)
    start = time.perf_counter()
    index = QuantizedIndex(int(array.shape[-1]), config)
    if len(array):
        LOG.debug("learning from at most %d vectors", args.train_rows)
        index.train(_training(array, args.train_rows), expected=len(array))
    with creating(args.index, index) as kept:
        add_all(kept, array, *labels, what="index")
    return _report(args, {"added": len(array), "seconds": time.perf_counter() - start})


def _labels(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]] | None]:
    """Return the ids and the metadata that go with the vectors."""
    from quantforge.cli.labels import read_ids, read_metadata

    return (
        None if args.ids is None else read_ids(args.ids),
        None if args.metadata is None else read_metadata(args.metadata),
    )


def _config(args: argparse.Namespace) -> IndexConfig:
    import dataclasses

    from quantforge.vectordb import IndexConfig

    config = IndexConfig() if args.config is None else IndexConfig.from_file(args.config)
    given = {name: getattr(args, name) for name in CONFIG}
    return dataclasses.replace(config, **{k: v for k, v in given.items() if v is not None})


def _training(array: Any, rows: int) -> Any:
    """Return a sample; of what can be read only once, the first vectors, which stay at hand."""
    from quantforge.inputs import sample

    return array[:rows] if getattr(array, "once", False) else sample(array, rows)


def _declare_add(parser: argparse.ArgumentParser) -> None:
    _declare_index(parser)
    _declare_vectors(parser)


def add(args: argparse.Namespace) -> int:
    """Add the vectors of a file to an index."""
    from quantforge.cli.shelf import add_all, changing
    from quantforge.inputs import open_vectors

    labels, start = _labels(args), time.perf_counter()
    with changing(args.index) as index:
        count = add_all(index, open_vectors(args.input, name=args.name), *labels, what="add")
    return _report(args, {"added": count, "seconds": time.perf_counter() - start})


def _declare_remove(parser: argparse.ArgumentParser) -> None:
    _declare_index(parser)
    parser.add_argument("ids", nargs="*", metavar="ID")
    parser.add_argument("--ids-from", type=Path, metavar="FILE",
                        help=".npy, or text with one id a line")  # fmt: skip


def remove(args: argparse.Namespace) -> int:
    """Remove vectors from an index."""
    from quantforge.cli.labels import parse_ids, read_ids
    from quantforge.cli.shelf import changing

    if bool(args.ids) == (args.ids_from is not None):
        raise CommandError("name the vectors to remove either as IDs or by --ids-from")
    ids = parse_ids(args.ids, "ID") if args.ids else read_ids(args.ids_from)
    with changing(args.index) as index:
        index.remove_ids(ids)
    return _report(args, {"removed": len(ids)})


def stats(args: argparse.Namespace) -> int:
    """Say how large an index is and how it is set."""
    return _report(args, {})


def _declare_calibrate(parser: argparse.ArgumentParser) -> None:
    _declare_index(parser)
    parser.add_argument("--recall", type=share, default=0.95, help="to reach (default: 0.95)")
    parser.add_argument("-k", type=whole(1), default=10, help="neighbours that it is about")


def calibrate(args: argparse.Namespace) -> int:
    """Choose how many lists a search looks into, and remember it."""
    import dataclasses

    from quantforge.cli.shelf import calibrated

    return _report(args, dataclasses.asdict(calibrated(args.index, args.recall, args.k)))


def _report(args: argparse.Namespace, done: dict[str, Any]) -> int:
    from quantforge.cli.shelf import stats as stats_of

    found = stats_of(args.index)
    if args.action == "stats":
        emit(args, found, "\n".join(f"{key}: {value}" for key, value in found.items()))
        return 0
    words = ", ".join(f"{key} {value:.4g}" for key, value in done.items())
    emit(args, {**done, **found}, f"{args.index}: {words}; {found['vectors']} vectors, "
                                  f"{size(found['bytes_on_disk'])}")  # fmt: skip
    return 0


Action = tuple[Callable[[argparse.Namespace], int], Callable[[argparse.ArgumentParser], None], str]

ACTIONS: dict[str, Action] = {
    "build": (build, _declare_build, "make an index from a file of vectors"),
    "add": (add, _declare_add, "add the vectors of a file"),
    "remove": (remove, _declare_remove, "remove vectors by id"),
    "stats": (stats, _declare_index, "say how large an index is and how it is set"),
    "calibrate": (calibrate, _declare_calibrate, "choose how many lists a search looks into"),
}
