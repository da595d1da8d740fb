"""decode_attention: one new token per sequence (or a few to verify) against a packed cache.

The first cases are those of issue 3, "Must reach"; the sweep is what `benchmarks.plots` draws.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases.kv import (
    Layer,
    attention_error,
    dense_calls,
    exact_baseline,
    packed_calls,
)
from benchmarks.registry import Case, Contenders, Size

MUST_REACH: tuple[tuple[tuple[int, int, int, int], dict[int, float]], ...] = (
    # (B, q_per_kv, q_len, Skv): {bits: times the best bf16 SDPA}
    ((8, 4, 1, 32768), {4: 3.0, 3: 3.2, 2: 3.6}),
    ((1, 4, 1, 131072), {4: 2.8, 3: 3.0, 2: 3.3}),
    ((32, 8, 1, 8192), {4: 2.6, 3: 2.8, 2: 3.0}),
    ((64, 4, 1, 2048), {4: 1.8, 3: 1.8, 2: 2.0}),
    ((4, 4, 8, 32768), {4: 2.5}),
)
SWEEP_BATCH = 8
SWEEP_LENGTHS = (1024, 2048, 4096, 8192, 16384, 65536, 131072)
SWEEP_BITS = (2, 3, 4, 8)


def _layers(size: Size) -> list[tuple[Layer, float | None, bool]]:
    """Return layers with the ratio they must reach and whether they are quick to measure."""
    if size == "small":
        small = {"kv_heads": 2, "dim": 64, "dtype": torch.float32}
        return [
            (Layer(2, 2, 1, 300, 4, 4, **small), None, True),
            (Layer(1, 2, 3, 300, 3, 2, **small), None, True),
        ]
    if size == "cpu":
        cpu = {"kv_heads": 2, "dtype": torch.float32}
        return [
            (Layer(1, 4, q_len, 32768, bits, bits, **cpu), None, bits == 4)
            for q_len, bits in ((1, 4), (1, 2), (8, 4))
        ]
    found = {
        Layer(*shape[:4], bits, bits): (goal, bits == 4)
        for shape, goals in MUST_REACH
        for bits, goal in goals.items()
    }
    exact = [Layer(8, 4, 1, 32768, bits, bits, codebook="lloyd_max") for bits in (4, 3, 2)]
    others = [
        *exact,
        Layer(8, 4, 1, 32768, 8, 8),
        Layer(8, 4, 1, 32768, 1, 1),
        Layer(8, 4, 1, 32768, 4, 2),
        Layer(8, 1, 1, 32768, 4, 4),
        Layer(8, 16, 1, 32768, 4, 4),
        *(Layer(SWEEP_BATCH, 4, 1, n, b, b) for b in SWEEP_BITS for n in SWEEP_LENGTHS),
    ]
    result = [(layer, goal, quick) for layer, (goal, quick) in found.items()]
    return result + [(layer, None, False) for layer in others if layer not in found]


def _make(layer: Layer, device: torch.device) -> Contenders:
    return Contenders(
        packed_calls(layer, device),
        dense_calls(layer, device),
        exact_baseline(layer, device),
        attention_error(layer),
    )


def cases(size: Size) -> list[Case]:
    """Return the cases; bytes are codes, scales, window and queries read, outputs written."""
    kind = "cuda" if size == "cuda" else "cpu"
    return [
        Case(
            "decode_attention", layer.name, layer.shape, layer.nbytes, layer.flops,
            layer.memory(kind), partial(_make, layer), quick, goal_ratio=goal,
        )
        for layer, goal, quick in _layers(size)
    ]  # fmt: skip
