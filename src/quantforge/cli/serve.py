"""Serve compression and collections over HTTP, with a page at /.

  quantforge serve --port 8000

With --shards a folder of index files can be searched too, over several processes: the first
serves, the others hold shards. Start them by torchrun, or with RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT set.

  torchrun --nproc-per-node 4 -m quantforge.cli serve --shards shards

An address that others can reach needs a token, from --token-file or the variable
QUANTFORGE_TOKEN.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantforge.cli.common import CommandError, add_compute, device_of, whole

if TYPE_CHECKING:
    from quantforge.vectordb.sharded import ShardedIndex

SUMMARY = "serve compression and search over HTTP"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="0 takes a free one")
    parser.add_argument("--folder", type=Path, help="of collections (default: quantforge-data)")
    parser.add_argument("--token-file", type=Path, help="file that holds the token of requests")
    parser.add_argument("--workers", type=whole(1), help="requests that compute at one time")
    parser.add_argument("--shards", type=Path, help="folder of index files, see above")
    parser.add_argument(
        "--shards-timeout", type=whole(1), default=600, metavar="SECONDS",
        help="until all processes have loaded their shards (default: 600)",
    )  # fmt: skip
    add_compute(parser, seed=False)


def run(args: argparse.Namespace) -> int:
    """Serve until it is told to stop."""
    if args.shards is None:
        _serve(args, {})
        return 0
    rank, index = _sharded(args)
    if rank > 0:
        _answer(index, rank)
        return 0
    try:
        _serve(args, {"sharded": index})
    finally:
        index.close()
    return 0


def _serve(args: argparse.Namespace, more: dict[str, Any]) -> None:
    device = device_of(args)
    try:
        from quantforge.server import run as run_server
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from error  # it names what is missing and the remedy
    from quantforge.server.settings import read_token

    options: dict[str, Any] = {"folder": args.folder, "workers": args.workers}
    given = {name: value for name, value in options.items() if value is not None}
    token = read_token(args.token_file, dict(os.environ))
    run_server(host=args.host, port=args.port, token=token, device=str(device), **given, **more)


def _sharded(args: argparse.Namespace) -> tuple[int, ShardedIndex]:
    """Return the rank of this process, and the index when its shards are loaded."""
    from torch.distributed import HashStore, rendezvous  # type: ignore[attr-defined]

    from quantforge.vectordb.sharded import ShardedIndex

    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    store = HashStore() if world == 1 else next(rendezvous("env://"))[0]
    return rank, ShardedIndex(args.shards, store, rank, world, timeout=args.shards_timeout)


def _answer(index: ShardedIndex, rank: int) -> None:
    """Answer until rank 0 stops."""
    from torch.distributed import DistNetworkError

    try:
        index.serve()
    except DistNetworkError as error:
        raise CommandError(f"rank {rank}: rank 0 has gone; start all again") from error
