"""Parsing the command line and running a command.

A command is a module with `SUMMARY`, `add_arguments(parser)` and `run(args) -> exit code`. What it
needs beyond the standard library it imports in `run`, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

import quantforge
from quantforge.cli import eval as eval_command
from quantforge.errors import QuantForgeError

COMMANDS: dict[str, ModuleType] = {"eval": eval_command}
FAILED = 1


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="quantforge", description="Vectors and KV caches in a few bits."
    )
    top.add_argument("--version", action="version", version=quantforge.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.SUMMARY, description=command.__doc__)
        sub.add_argument("-v", "--verbose", action="store_true", help="more on stderr")
        sub.set_defaults(run=command.run)
        command.add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parser().parse_args(argv)
    level = logging.DEBUG if args.verbose else logging.INFO
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("quantforge").setLevel(level)
    try:
        return args.run(args)
    except (QuantForgeError, OSError) as error:
        print(f"quantforge {args.command}: {error}", file=sys.stderr)
        return FAILED
