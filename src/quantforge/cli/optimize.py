"""Find the code or index that suits your vectors, or the bits of a model's cache, by measuring.

  quantforge optimize data.npy
  quantforge optimize data.npy --max-bytes 100 --save settings.json
  quantforge optimize MODEL --text FILE --bits 2 3 4 --save settings.json

A settings file is what `compress --config`, `benchmark --config` and `index build --config` take,
and `QuantForgeCache.from_file`.
"""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path
from typing import Any

from quantforge.cli.common import (
    BITS,
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

SUMMARY = "find the settings that suit your vectors or your model"
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
    parser.add_argument(
        "--max-bytes", type=float, help="bytes that a vector, or a sequence, may have"
    )
    parser.add_argument("--min-accuracy", type=share, help="accuracy to reach")
    parser.add_argument("--policy", choices=("auto", "exhaustive", "random", "tpe", "nsga2"),
                        default="auto", help="how points are chosen")  # fmt: skip
    parser.add_argument("--trials", type=whole(1), default=100, help="points, unless all are")
    parser.add_argument("--sample", type=whole(2), default=10_000, help="vectors measured on")
    model = parser.add_argument_group("of a model", "whose folder or name stands for the input")
    model.add_argument("--text", type=Path, help="file to take passages from, new to the model")
    model.add_argument("--bits", type=BITS, nargs="+", default=[2, 3, 4],
                       help="of uniform caches, whose bytes are spent better")  # fmt: skip
    model.add_argument("--passages", type=whole(4), default=32, help="half of them held out")
    model.add_argument("--prompt", type=whole(1), default=1024, help="tokens that are packed")
    model.add_argument("--rest", type=whole(1), default=64, help="tokens that attend to them")
    model.add_argument("--max-kl", type=float, help="greatest mean KL allowed, nats")
    parser.add_argument("--save", type=Path, help="settings file for what is recommended")
    parser.add_argument("--plot", type=path_ending_in(*PLOT_SUFFIXES), help="file for a plot")
    add_compute(parser)
    add_force(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Search and print."""
    check_new(args.save, args.force)
    check_plot(args.plot, args.force)
    result = _of_vectors(args) if args.text is None else _of_model(args)
    if args.save is not None:
        result.config.save(args.save)
    if args.plot is not None:
        result.plot(args.plot)
    emit(args, result.to_dict(), str(result))
    return 0


def _of_vectors(args: argparse.Namespace) -> Any:
    device = device_of(args)
    from quantforge.inputs import open_vectors, sample
    from quantforge.optimizer import optimize

    array = open_vectors(args.input, name=args.name)
    return optimize(
        sample(array, max(SAMPLE_READ, 2 * args.sample)),
        accuracy=args.accuracy,
        metric=args.metric,
        min_accuracy=args.min_accuracy,
        policy=args.policy,
        trials=args.trials,
        sample=args.sample,
        stored=prod(array.shape[:-1]),
        device=str(device),
        seed=args.seed or 0,
        **_common(args),
    )


def _of_model(args: argparse.Namespace) -> Any:
    device = device_of(args)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from quantforge.llm.evaluation import passages
    from quantforge.optimizer import optimize

    text = args.text.read_text("utf-8")
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.input)
    tokens = passages(tokenizer, text, args.passages, args.prompt + args.rest)
    model: Any = AutoModelForCausalLM.from_pretrained(args.input, dtype="auto")
    return optimize(
        model.to(device).eval(),
        tokens,
        bits=args.bits,
        prompt=args.prompt,
        max_kl=args.max_kl,
        **_common(args),
    )


def _common(args: argparse.Namespace) -> dict[str, Any]:
    from quantforge.optimizer import Weights

    return {
        "objective": args.objective if args.weights is None else Weights(*args.weights),
        "max_bytes": args.max_bytes,
        "progress": lambda what: LOG.info("measuring: %s", what),
    }
