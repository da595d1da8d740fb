"""Compress vectors into a few bits a number.

  quantforge compress embeddings.npy --bits 4 --output compressed.npz

A .safetensors file is memory-mapped and searched as it is; numpy alone can decode a .npz file.
Data may be larger than memory.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from quantforge.cli.common import (
    BITS,
    LOG,
    add_code,
    add_compute,
    add_force,
    add_input,
    add_json,
    check_new,
    code_of,
    device_of,
    emit,
    path_ending_in,
    size,
)

SUMMARY = "compress vectors into a few bits a number"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_input(parser)
    parser.add_argument("--bits", type=BITS, help="bits per number, 1-8 (default: 4)")
    parser.add_argument("-o", "--output", type=path_ending_in(".safetensors", ".npz"),
                        help="(default: INPUT.quantforge.safetensors)")  # fmt: skip
    add_code(parser)
    add_compute(parser)
    add_force(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compress and report."""
    output: Path = args.output or default_output(args.input, ".quantforge.safetensors")
    check_new(output, args.force)
    config, device = code_of(args, args.bits), device_of(args)
    from quantforge.inputs import open_vectors
    from quantforge.pipeline import QuantPipeline, quantized_in

    array = open_vectors(args.input, name=args.name)
    pipeline = QuantPipeline(int(array.shape[-1]), config)
    LOG.debug("code: %s", pipeline.spec)
    start = time.perf_counter()
    pipeline.compress_file(array, output, device=device)
    seconds = time.perf_counter() - start
    q = quantized_in(output)
    before = q.numel() * array.dtype.itemsize
    after = output.stat().st_size
    data = {
        "output": str(output), "shape": list(q.shape), "bits": config.bits,
        "input_bytes": before, "output_bytes": after, "ratio": before / after, "seconds": seconds,
    }  # fmt: skip
    emit(args, data, f"{output}: {tuple(q.shape)} in {config.bits} bits, {size(before)} -> "
                     f"{size(after)} ({before / after:.2f}x), {seconds:.1f} s")  # fmt: skip
    return 0


def default_output(source: str, suffix: str) -> Path:
    """Return where the result for an input goes if nobody says."""
    path = Path("stdin" if source == "-" else source)
    return path.with_name(path.stem.removesuffix(".quantforge") + suffix)
