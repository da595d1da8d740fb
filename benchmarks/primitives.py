"""What torch's own functions cost and get wrong, where quantforge goes around them (docs/LOG.md).

python -m benchmarks.primitives
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.record import median_ms, save
from quantforge import QuantSpec, QuantTensor
from quantforge.ops import tiles, transform
from quantforge.ops.constants import boundaries, cells
from quantforge.ops.quantize.eager import exact_sqrt, nearest

CPU = torch.device("cpu")


def roots() -> dict[str, Any]:
    """Return the share of float32 roots that are not the correctly rounded one."""
    x = torch.rand(1 << 22, generator=torch.Generator().manual_seed(0)) * 100
    right = np.sqrt(x.numpy())
    return {
        "what": "square roots not correctly rounded",
        "torch.sqrt": float((x.sqrt().numpy() != right).mean()),
        "through float64": float((exact_sqrt(x).numpy() != right).mean()),
    }


def searches(bits: int) -> dict[str, Any]:
    """Return the cost of finding the code of a number, ns."""
    spec, u = QuantSpec(128, bits), torch.randn(128, 2048)
    cells(spec, CPU)
    return {
        "what": f"nearest centroid at {bits} bits, ns",
        "torch.bucketize": 1e6
        * median_ms(lambda: torch.bucketize(u, boundaries(spec, CPU)), "cpu")
        / u.numel(),
        "uniform cells": 1e6 * median_ms(lambda: nearest(u, spec), "cpu") / u.numel(),
    }


def lookups() -> dict[str, Any]:
    """Return the cost of one lookup of four float32 values, ns: a row, or one wide element."""
    table = torch.randn(65536, 4)
    index = torch.randint(0, 65536, (1 << 16,), dtype=torch.int32)
    wide = table.view(torch.complex128).flatten()
    return {
        "what": "lookup of four float32 values, ns",
        "row": 1e6 * median_ms(lambda: table.index_select(0, index), "cpu") / index.numel(),
        "complex128 element": 1e6
        * median_ms(lambda: wide.index_select(0, index), "cpu")
        / index.numel(),
    }


def rotations(dim: int) -> dict[str, Any]:
    """Return the time to decode 12.8 million numbers with either way to rotate, ms."""
    codes = QuantTensor.quantize(torch.randn(12_800_000 // dim, dim), QuantSpec(dim))
    chosen, times = transform.MAX_DENSE_DIM["cpu"], {}
    for name, limit in (("matmul", dim), ("butterfly", 0)):
        transform.MAX_DENSE_DIM["cpu"] = limit
        tiles.components.cache_clear()
        times[name] = median_ms(codes.dequantize, "cpu", 5)
    transform.MAX_DENSE_DIM["cpu"] = chosen
    tiles.components.cache_clear()
    return {"what": f"decoding at dim {dim}, ms", **times}


def main() -> None:
    torch.set_num_threads(1)
    rows = [roots(), *map(searches, (2, 4, 8)), lookups(), *map(rotations, (128, 256, 384, 768))]
    for row in rows:
        print(row["what"], *(f"{k} {v:.4g}" for k, v in row.items() if k != "what"), sep="  ")
    print(save("primitives_cpu", "cpu", rows))


if __name__ == "__main__":
    main()
