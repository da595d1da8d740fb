"""dequantize: codes and scales in, dense vectors out, in one pass."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases.codec import SHAPES, Vectors, copies
from benchmarks.registry import Case, Contenders, Size
from quantforge.ops.dequantize import op


def _make(vectors: Vectors, device: torch.device) -> Contenders:
    statistics = vectors.statistics(device)
    ours = [
        partial(op.dequantize, *parts, *statistics, vectors.spec.key, vectors.dtype)
        for parts in vectors.packed(device)
    ]
    return Contenders(ours, copies(vectors.dense(device)))


def cases(size: Size) -> list[Case]:
    """Return the cases; bytes are codes and scales read, dense vectors written."""
    kind, goal = ("cuda", 0.7) if size == "cuda" else ("cpu", None)
    return [
        Case(
            "dequantize", vectors.name, vectors.shape, vectors.nbytes, vectors.flops,
            vectors.memory(kind), partial(_make, vectors), vectors.quick, goal_share=goal,
        )
        for vectors in SHAPES[size]
    ]  # fmt: skip
