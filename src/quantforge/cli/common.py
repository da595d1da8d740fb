"""What commands share: arguments, the device, results on stdout, plots."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantforge.errors import QuantForgeError

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from quantforge.config import QuantForgeConfig

LOG = logging.getLogger("quantforge.cli")
PLOT_SUFFIXES = (".svg", ".png", ".pdf")
INPUT_HELP = ".npy, .npz, .safetensors, .parquet, .arrow, .fvecs, .bvecs; - is .npy on stdin"


class CommandError(QuantForgeError):
    """A command that cannot be done; the message is all that is printed."""


# ---- types of arguments --------------------------------------------------------------------


def whole(low: int, high: int | None = None) -> Any:
    """Return a type of integers from `low` to `high`."""

    def parse(text: str) -> int:
        number = int(text)
        if number < low or (high is not None and number > high):
            limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"must be an integer {limit}, not {text}")
        return number

    parse.__name__ = "integer"  # for argparse's own message
    return parse


def share(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return number


def path_ending_in(*suffixes: str) -> Any:
    """Return a type of paths with one of these suffixes."""

    def parse(text: str) -> Path:
        if Path(text).suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"must end in {' or '.join(suffixes)}, not {text}")
        return Path(text)

    return parse


BITS = whole(1, 8)


# ---- arguments -----------------------------------------------------------------------------


def add_input(parser: argparse.ArgumentParser, *, dest: str = "input", what: str = "") -> None:
    """Declare a file of vectors, and which of its arrays."""
    parser.add_argument(dest, metavar=dest.upper(), help=what or f"vectors: {INPUT_HELP}")
    parser.add_argument("--name", help="of the array, where a file holds several")


def add_compute(parser: argparse.ArgumentParser, *, seed: bool = True) -> None:
    """Declare where and how to compute."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=whole(1), help="of the CPU (default: torch's)")
    if seed:
        parser.add_argument("--seed", type=whole(0, 2**32 - 1), help="of rotations (default: 0)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare the form of the result."""
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def add_force(parser: argparse.ArgumentParser) -> None:
    """Declare that files may be replaced."""
    parser.add_argument("--force", action="store_true", help="replace files that are there")


def add_code(parser: argparse.ArgumentParser) -> None:
    """Declare the fields of a `QuantForgeConfig`, but for bits and seed."""
    parser.add_argument("--config", type=Path, help="settings file, as `optimize` writes one")
    parser.add_argument("--rotation", choices=("auto", "hadamard", "qr", "none"))
    parser.add_argument("--codebook", choices=("lloyd_max", "gaussian", "e4m3"))
    parser.add_argument("--scale-rule", choices=("unbiased", "norm", "mse"))
    parser.add_argument("--scale-dtype", choices=("float16", "float32"))
    parser.add_argument("--estimator", choices=("mse", "prod"), help="prod adds a QJL residual")
    for name, what in (("shift", "subtract the mean"), ("equalizer", "even out the channels")):
        parser.add_argument(f"--{name}", action="store_true", default=None,
                            help=f"{what} (reads the data twice)")  # fmt: skip


def code_of(args: argparse.Namespace, bits: int | None) -> QuantForgeConfig:
    """Return the config that the arguments ask for; they win over a settings file."""
    import dataclasses

    from quantforge.config import QuantForgeConfig

    config = QuantForgeConfig() if args.config is None else QuantForgeConfig.from_file(args.config)
    names = ("rotation", "codebook", "scale_rule", "scale_dtype", "estimator", "shift",
             "equalizer", "seed")  # fmt: skip
    asked = {name: getattr(args, name) for name in names} | {"bits": bits}
    given = {name: value for name, value in asked.items() if value is not None}
    return dataclasses.replace(config, **given)


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device, after the threads have been set.

    Raises:
        CommandError: for a device that is not there.
    """
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise CommandError(f"there is no device {args.device!r}; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"{args.device!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(
            f"there is no device {args.device!r}: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs; use cpu"
        )
    return device


def check_new(path: Path | None, force: bool) -> None:
    """Raise `CommandError` if there is something at a path that may not be replaced."""
    if path is not None and path.exists() and not force:
        raise CommandError(f"{path} is there already; --force replaces it")


# ---- results -------------------------------------------------------------------------------


def emit(args: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    """Print a result."""
    import json

    print(json.dumps(data, indent=1) if args.json else text)


def size(nbytes: float) -> str:
    """Return bytes as text, in units of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def check_plot(path: Path | None, force: bool) -> None:
    """Raise `CommandError` now if a plot cannot be written later."""
    if path is None:
        return
    check_new(path, force)
    new_figure(1, 1)


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of so many inches; without a screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CommandError("a plot needs matplotlib: pip install 'quantforge[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
