"""Say what a file holds: arrays, compressed tensors, or an index."""

from __future__ import annotations

import argparse
from math import prod
from typing import TYPE_CHECKING, Any

from quantforge.cli.common import add_json, emit, size
from quantforge.text import table

if TYPE_CHECKING:
    from quantforge.inputs import Entry

SUMMARY = "say what a file or an index holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", metavar="INPUT", help="any file that quantforge reads or writes")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """List and print."""
    from quantforge.cli.shelf import is_index, stats

    if is_index(args.input):
        data = stats(args.input)
        emit(args, data, "\n".join(f"{key}: {value}" for key, value in data.items()))
        return 0
    from quantforge.inputs import list_arrays

    found = [_describe(name, entry) for name, entry in list_arrays(args.input).items()]
    lines = [
        (
            array["name"], str(tuple(array["shape"])), array["dtype"], _code(array.get("spec")),
            "-" if array["nbytes"] is None else size(array["nbytes"]),
            f"{array['ratio']:.2f}x" if "ratio" in array else "-",
        )
        for array in found
    ]  # fmt: skip
    head = ("name", "shape", "dtype", "code", "bytes", "ratio")
    emit(args, {"arrays": found}, table(head, lines))
    return 0


def _describe(name: str, entry: Entry) -> dict[str, Any]:
    import dataclasses

    import torch

    from quantforge.numerics.packing import packed_width

    dtype = getattr(torch, entry.dtype, None)
    dense = prod(entry.shape) * dtype.itemsize if isinstance(dtype, torch.dtype) else None
    data: dict[str, Any] = {
        "name": name,
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "nbytes": dense,
    }
    if entry.spec is not None and dense is not None:
        scales = entry.spec.scales_per_vector * getattr(torch, entry.spec.scale_dtype).itemsize
        packed = prod(entry.shape[:-1]) * (packed_width(entry.spec) + scales)
        data |= {"nbytes": packed, "ratio": dense / max(packed, 1)}
        data["spec"] = dataclasses.asdict(entry.spec)
    return data


def _code(spec: dict[str, Any] | None) -> str:
    if spec is None:
        return "-"
    names = [spec["rotation"], spec["codebook"].partition(":")[0], spec["scale_rule"]]
    names += ["qjl"] if spec["estimator"] == "prod" else []
    return f"{spec['bits']} bits, {', '.join(names)}"
