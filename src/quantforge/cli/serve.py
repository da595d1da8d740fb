"""Serve compression and collections over HTTP, with a page at /.

  quantforge serve --port 8000

An address that others can reach needs a token, from --token-file or the variable
QUANTFORGE_TOKEN.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from quantforge.cli.common import CommandError, add_compute, device_of, whole

SUMMARY = "serve compression and search over HTTP"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="0 takes a free one")
    parser.add_argument("--folder", type=Path, help="of collections (default: quantforge-data)")
    parser.add_argument("--token-file", type=Path, help="file that holds the token of requests")
    parser.add_argument("--workers", type=whole(1), help="requests that compute at one time")
    add_compute(parser, seed=False)


def run(args: argparse.Namespace) -> int:
    """Serve until it is told to stop."""
    device = device_of(args)
    try:
        from quantforge.server import run as run_server
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from error  # it names what is missing and the remedy
    from quantforge.server.settings import read_token

    options: dict[str, Any] = {"folder": args.folder, "workers": args.workers}
    given = {name: value for name, value in options.items() if value is not None}
    token = read_token(args.token_file, dict(os.environ))
    run_server(host=args.host, port=args.port, token=token, device=str(device), **given)
    return 0
