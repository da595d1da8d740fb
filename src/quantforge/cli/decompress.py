"""Decode a compressed file into a .npy file.

quantforge decompress compressed.npz --output restored.npy
"""

from __future__ import annotations

import argparse
import time

from quantforge.cli.common import (
    LOG,
    add_compute,
    add_force,
    add_json,
    check_new,
    device_of,
    emit,
    path_ending_in,
    size,
)
from quantforge.cli.compress import default_output

SUMMARY = "decode a compressed file into a .npy file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", metavar="INPUT", help=".safetensors or .npz, as compress writes")
    parser.add_argument("--name", help="of the tensor, where a file holds several")
    parser.add_argument("-o", "--output", type=path_ending_in(".npy"),
                        help="(default: INPUT.restored.npy)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float16", "float32", "float64"),
                        help="of the numbers (default: that of the vectors)")  # fmt: skip
    add_compute(parser, seed=False)
    add_force(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Decode and report."""
    output = args.output or default_output(args.input, ".restored.npy")
    check_new(output, args.force)
    device = device_of(args)
    import torch

    from quantforge.pipeline import QuantPipeline, quantized_in

    q = quantized_in(args.input, args.name)
    dtype = q.dtype if args.dtype is None else getattr(torch, args.dtype)
    if dtype == torch.bfloat16:
        LOG.info("numpy has no bfloat16: writing float32, which holds the same numbers")
        dtype = torch.float32
    start = time.perf_counter()
    QuantPipeline(q.spec.dim).decompress_file(
        args.input, output, name=args.name, dtype=dtype, device=device
    )
    seconds = time.perf_counter() - start
    nbytes = output.stat().st_size
    name = str(dtype).removeprefix("torch.")
    data = {"output": str(output), "shape": list(q.shape), "dtype": name, "output_bytes": nbytes,
            "seconds": seconds}  # fmt: skip
    text = f"{output}: {tuple(q.shape)} {name}, {size(nbytes)}, {seconds:.1f} s"
    emit(args, data, text)
    return 0
