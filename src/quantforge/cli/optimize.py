"""Find the code or index that suits your vectors, by measuring.

  quantforge optimize data.npy
  quantforge optimize data.npy --max-bytes 100 --save settings.json

A settings file is what `compress --config`, `benchmark --config` and `index build --config` take.
"""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path

from quantforge.cli.common import (
    LOG,
    PLOT_SUFFIXES,
    add_compute,
    add_force,
    add_input,
    add_json,
    check_new,
    check_plot,
    device_of,
    emit,
    path_ending_in,
    share,
    whole,
)

SUMMARY = "find the settings that suit your vectors"
SAMPLE_READ = 20_000
"""Vectors read, of which the optimizer takes its sample."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_input(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--objective", choices=("balanced", "accuracy", "bytes", "latency"),
                      default="balanced", help="what counts most")  # fmt: skip
    what.add_argument("--weights", type=float, nargs=3, metavar=("ACC", "MEM", "LAT"),
                      help="of accuracy, memory and latency, instead")  # fmt: skip
    parser.add_argument("--accuracy", choices=("recall", "cosine", "mse"), default="recall",
                        help="what accuracy means (default: recall, of ten)")  # fmt: skip
    parser.add_argument("--metric", choices=("ip", "cosine", "l2"), default="ip")
    parser.add_argument("--max-bytes", type=float, help="bytes that a vector may have")
    parser.add_argument("--min-accuracy", type=share, help="accuracy to reach")
    parser.add_argument("--policy", choices=("auto", "exhaustive", "random", "tpe", "nsga2"),
                        default="auto", help="how points are chosen")  # fmt: skip
    parser.add_argument("--trials", type=whole(1), default=100, help="points, unless all are")
    parser.add_argument("--sample", type=whole(2), default=10_000, help="vectors measured on")
    parser.add_argument("--save", type=Path, help="settings file for what is recommended")
    parser.add_argument("--plot", type=path_ending_in(*PLOT_SUFFIXES), help="file for a plot")
    add_compute(parser)
    add_force(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Search and print."""
    check_new(args.save, args.force)
    check_plot(args.plot, args.force)
    device = device_of(args)
    from quantforge.inputs import open_vectors, sample
    from quantforge.optimizer import Weights, optimize

    array = open_vectors(args.input, name=args.name)
    result = optimize(
        sample(array, max(SAMPLE_READ, 2 * args.sample)),
        objective=args.objective if args.weights is None else Weights(*args.weights),
        accuracy=args.accuracy,
        metric=args.metric,
        max_bytes=args.max_bytes,
        min_accuracy=args.min_accuracy,
        policy=args.policy,
        trials=args.trials,
        sample=args.sample,
        stored=prod(array.shape[:-1]),
        device=str(device),
        seed=args.seed or 0,
        progress=lambda what: LOG.info("measuring: %s", what),
    )
    if args.save is not None:
        result.config.save(args.save)
    if args.plot is not None:
        result.plot(args.plot)
    emit(args, result.to_dict(), str(result))
    return 0
