"""quantize: dense vectors in, codes and scales out, in one pass."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases.codec import SHAPES, Vectors, copies
from benchmarks.registry import Case, Contenders, Size
from quantforge.ops.quantize import op


def _make(vectors: Vectors, device: torch.device) -> Contenders:
    x, statistics = vectors.dense(device), vectors.statistics(device)
    ours = [partial(op.quantize, t, *statistics, vectors.spec.key) for t in x]
    return Contenders(ours, copies(x))


def cases(size: Size) -> list[Case]:
    """Return the cases; bytes are dense vectors read, codes and scales written."""
    kind, goal = ("cuda", 0.6) if size == "cuda" else ("cpu", None)
    return [
        Case(
            "quantize", vectors.name, vectors.shape, vectors.nbytes, vectors.flops,
            vectors.memory(kind), partial(_make, vectors), vectors.quick, goal_share=goal,
        )
        for vectors in SHAPES[size]
    ]  # fmt: skip
