"""Compress all files of vectors below a folder.

  python -m quantforge.encode INPUT OUTPUT --bits 4
  torchrun --nproc-per-node 8 -m quantforge.encode INPUT OUTPUT --device cuda
  srun --ntasks 64 python -m quantforge.encode INPUT OUTPUT

Run it again after a failure: what is done stays. `--status` counts what all workers have done.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantforge.cli.common import BITS, add_code, add_compute, code_of, device_of
from quantforge.errors import QuantForgeError

POLL_SECONDS = 1.0


def worker_of(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Return rank, world and the rank on this machine, by torchrun or SLURM; else 0, 1, 0."""
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if rank in environment and world in environment:
            return int(environment[rank]), int(environment[world]), int(environment.get(local, 0))
    return 0, 1, 0


def main(argv: Sequence[str] | None = None) -> int:
    """Do this worker's share; 1 if files could not be compressed."""
    parser = argparse.ArgumentParser(
        prog="quantforge.encode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", type=Path, help="folder of files of vectors")
    parser.add_argument("output", type=Path, help="folder for the codes")
    parser.add_argument("--name", help="of the array, where files hold several")
    parser.add_argument("--bits", type=BITS, help="bits per number, 1-8 (default: 4)")
    parser.add_argument("--status", action="store_true", help="count what is done, and end")
    add_code(parser)
    add_compute(parser)
    args = parser.parse_args(argv)
    rank, world, local = worker_of(os.environ)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"[{rank}/{world}] %(message)s"
    )
    try:
        return _run(args, rank, world, local)
    except QuantForgeError as error:
        print(f"[{rank}/{world}] {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace, rank: int, world: int, local: int) -> int:
    from quantforge.encode.folder import encode_folder, progress

    if args.status:
        found = progress(args.input, args.output)
        print(found)
        for file, error in found.failed.items():
            print(f"{file}: {error}")
        return 1 if found.failed else 0
    if args.device == "cuda" and world > 1:
        args.device = f"cuda:{local}"
    failed = encode_folder(
        args.input,
        args.output,
        code_of(args, args.bits),
        rank=rank,
        world=world,
        name=args.name,
        device=device_of(args),
    )
    # torchrun ends all workers when one fails: the others shall finish first
    while failed and "TORCHELASTIC_RUN_ID" in os.environ:
        if progress(args.input, args.output).is_over:
            break
        time.sleep(POLL_SECONDS)
    print(progress(args.input, args.output))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
