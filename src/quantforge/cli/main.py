"""Parsing the command line and running a command.

A command is a module with `SUMMARY`, `add_arguments(parser)` and `run(args) -> exit code`. What it
needs beyond the standard library it imports in `run`, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import quantforge
from quantforge.cli import (
    benchmark,
    completion,
    compress,
    decompress,
    demo,
    index,
    info,
    optimize,
    search,
    serve,
)
from quantforge.cli import eval as eval_command
from quantforge.errors import QuantForgeError

COMMANDS: dict[str, ModuleType] = {
    "compress": compress,
    "decompress": decompress,
    "info": info,
    "benchmark": benchmark,
    "optimize": optimize,
    "eval": eval_command,
    "index": index,
    "search": search,
    "serve": serve,
    "demo": demo,
    "completion": completion,
}
FAILED = 1


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands; the arguments of `only` one are declared if it is given.

    Declaring them all takes longer than everything else that `--help` does.
    """
    top = argparse.ArgumentParser(
        prog="quantforge",
        description="Vectors and KV caches in a few bits.",
        epilog="Results go to stdout, the rest to stderr. Exit codes: 0 done, 1 failed, 2 usage.",
    )
    top.add_argument("--version", action="version", version=quantforge.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("-v", "--verbose", action="store_true", help="more on stderr")
        sub.set_defaults(run=command.run)
        if only in (None, name):
            command.add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    command = next((word for word in words if not word.startswith("-")), "")
    args = parser(command).parse_args(words)
    level = logging.DEBUG if args.verbose else logging.INFO
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    log = logging.getLogger("quantforge")
    log.setLevel(level)
    try:
        code: int = args.run(args)
        sys.stdout.flush()  # a reader that has gone is noticed here, not at exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print(f"quantforge {args.command}: interrupted", file=sys.stderr)
        return FAILED
    except (QuantForgeError, OSError) as error:
        log.debug("where it was raised:", exc_info=True)
        print(f"quantforge {args.command}: {error}", file=sys.stderr)
        return FAILED
    return code
