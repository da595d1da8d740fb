"""Measure what compression costs and loses on your vectors.

  quantforge benchmark data.npy --bits 4
  quantforge benchmark data.npy --bits 1 2 3 4 8 --plot error.svg

Printed are the relative squared error against what theory expects of vectors without structure,
the cosine to the vector, recall of the nearest by inner product, bytes, and speed in GB/s of
float32. A sample of the vectors is taken; some of it are the queries and are not searched.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantforge.cli.common import (
    BITS,
    LOG,
    PLOT_SUFFIXES,
    CommandError,
    add_code,
    add_compute,
    add_force,
    add_input,
    add_json,
    check_new,
    check_plot,
    code_of,
    device_of,
    emit,
    new_figure,
    path_ending_in,
    whole,
)
from quantforge.text import table

if TYPE_CHECKING:
    from quantforge.measure import Measured

SUMMARY = "measure error, recall, bytes and speed on your vectors"
HEAD = ("bits", "bytes", "ratio", "MSE", "theory", "bound", "cosine", "recall", "encode GB/s",
        "decode GB/s")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_input(parser)
    parser.add_argument("--bits", type=BITS, nargs="+", default=[1, 2, 3, 4, 6, 8],
                        metavar="B", help="bits per number (default: 1 2 3 4 6 8)")  # fmt: skip
    parser.add_argument("--rows", type=whole(1), default=20_000, help="vectors in the sample")
    parser.add_argument("--queries", type=whole(0), default=200, help="of them, at most a half")
    parser.add_argument("-k", type=whole(1), default=10, help="neighbours that recall is about")
    add_code(parser)
    add_compute(parser)
    parser.add_argument("--output", type=Path, help="file for the JSON, besides stdout")
    parser.add_argument("--plot", type=path_ending_in(*PLOT_SUFFIXES),
                        help="file for a plot of error and recall")  # fmt: skip
    add_force(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    check_new(args.output, args.force)
    check_plot(args.plot, args.force)
    configs, device = [code_of(args, bits) for bits in args.bits], device_of(args)
    import json
    import platform

    import torch

    import quantforge
    from quantforge.inputs import open_vectors, sample
    from quantforge.measure import measure

    x = sample(open_vectors(args.input, name=args.name), args.rows).to(device)
    if len(x) < 2:
        raise CommandError(f"{args.input} must hold at least 2 vectors; it has {len(x)}")
    chosen = torch.zeros(len(x), dtype=torch.bool, device=device)
    if count := min(args.queries, len(x) // 2):
        chosen[:: len(x) // count] = True
    data, queries = x[~chosen], x[chosen][:count]
    found = []
    for config in configs:
        LOG.info("measuring: %d bits", config.bits)
        found.append(measure(data, queries, config, k=args.k))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    report = {
        "input": args.input, "dim": x.shape[1], "vectors": len(data), "queries": len(queries),
        "k": min(args.k, len(data)), "results": [measured.to_dict() for measured in found],
        "device": str(device), "hardware": name or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "quantforge": quantforge.__version__,
    }  # fmt: skip
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if args.plot is not None:
        plot(report, found, args.plot)
    head = f"{len(data)} vectors of dim {x.shape[1]}, {len(queries)} queries, {device}"
    emit(args, report, f"{head}\n{table(HEAD, [_row(measured) for measured in found])}")
    return 0


def _row(m: Measured) -> Sequence[str]:
    theory = "-" if m.theory is None else f"{m.theory:.5f}"
    recall = "-" if m.recall is None else f"{m.recall:.3f}"
    return (
        str(m.bits), f"{m.bytes_per_vector:.0f}", f"{m.ratio:.2f}x", f"{m.mse:.5f}", theory,
        f"{m.bound:.5f}", f"{m.cosine:.5f}", recall, f"{m.encode_gb_s:.2f}",
        f"{m.decode_gb_s:.2f}",
    )  # fmt: skip


def plot(report: dict[str, Any], found: Sequence[Measured], path: Path) -> None:
    """Draw error against theory, and recall, over bits."""
    found = sorted(found, key=lambda m: m.bits)
    bits = [m.bits for m in found]
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    left.plot(bits, [m.mse for m in found], "o-", color="#4477aa", label="measured")
    if all(m.theory is not None for m in found):
        left.plot(bits, [m.theory for m in found], "--", color="#ee6677", label="theory")
    left.plot(bits, [m.bound for m in found], ":", color="#777777", label="Shannon bound")
    left.set(xlabel="bits per number", ylabel="relative squared error", yscale="log")
    right.plot(bits, [m.recall or 0.0 for m in found], "o-", color="#4477aa")
    right.set(xlabel="bits per number", ylabel=f"recall@{report['k']}", ylim=(0, 1.02))
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xticks(bits)
    figure.suptitle(f"{report['vectors']} vectors of dim {report['dim']}", fontsize=10)
    figure.savefig(path)
    LOG.info("plot: %s", path)
