"""extend_attention: a chunk of new tokens against a packed history and themselves (causal)."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases.decode_attention import _make
from benchmarks.cases.kv import Layer
from benchmarks.registry import Case, Size


def _layers(size: Size) -> list[tuple[Layer, float | None, bool]]:
    if size == "small":
        return [(Layer(1, 2, 40, 300, 4, 4, kv_heads=2, dim=64, dtype=torch.float32), None, True)]
    if size == "cpu":
        return [(Layer(1, 4, 128, 8192, 4, 4, kv_heads=2, dtype=torch.float32), None, True)]
    return [
        (Layer(1, 4, 512, 32768 + 512, 4, 4), 0.9, True),
        (Layer(1, 4, 512, 32768 + 512, 2, 2), None, False),
        (Layer(1, 4, 2048, 32768 + 2048, 4, 4), None, False),
        (Layer(8, 4, 512, 8192 + 512, 4, 4), None, False),
        (Layer(1, 4, 64, 32768 + 64, 4, 4), None, False),
    ]


def cases(size: Size) -> list[Case]:
    """Return the cases; bytes are codes, scales, dense tokens, queries read, outputs written."""
    kind = "cuda" if size == "cuda" else "cpu"
    return [
        Case(
            "extend_attention", layer.name, layer.shape, layer.nbytes, layer.flops,
            layer.memory(kind), partial(_make, layer), quick, goal_ratio=goal,
        )
        for layer, goal, quick in _layers(size)
    ]  # fmt: skip
