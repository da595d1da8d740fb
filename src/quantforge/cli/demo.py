"""Show the main job on real input that ships with quantforge.

A tiny language model writes text and recalls planted codes with its own KV cache and with 4, 3
and 2 bits; then the docstrings of your Python are embedded, kept in a few bits, and searched.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import quantforge
from quantforge.cli.common import LOG, CommandError, add_compute, device_of

SUMMARY = "show a quantized cache and a search on what ships with quantforge"
PARTS = {"cache": "demo_cache.py", "search": "demo_search.py"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--only", choices=tuple(PARTS), help="one of the two parts")
    parser.add_argument("--small", action="store_true", help="less text, fewer docstrings")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for results")
    add_compute(parser)


def run(args: argparse.Namespace) -> int:
    """Run the recipes."""
    device, folder = device_of(args), recipes()
    arguments = ["--device", str(device), "--seed", str(args.seed or 0), "--output",
                 str(args.output), *(["--small"] if args.small else [])]  # fmt: skip
    import runpy

    before = sys.argv
    for part in [args.only] if args.only else PARTS:
        LOG.info("running %s", folder / PARTS[part])
        try:
            sys.argv = ["", *arguments]
            runpy.run_path(str(folder / PARTS[part]), run_name="__main__")
        except AssertionError as error:
            raise CommandError(f"the demo's claim does not hold here: {error}") from error
        finally:
            sys.argv = before
    return 0


def recipes() -> Path:
    """Return the folder of the recipes: in a wheel beside the modules, else in the checkout.

    Raises:
        CommandError: if there is none.
    """
    package = Path(quantforge.__file__).parent
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if all((folder / name).is_file() for name in PARTS.values()):
            return folder
    raise CommandError(
        "this installation has no recipes; run the demo in a checkout of quantforge: make demo"
    )
