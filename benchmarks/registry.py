"""What is measured: for each operator its cases, their formulas, calls and baselines.

A case is one operator on one shape. `nbytes` is what the operator cannot avoid moving (inputs
read once, outputs written once) and `flops` the arithmetic of the dense formula; time divided by
these gives the numbers of the tables. `make(device)` allocates random inputs and returns the
calls: for every contender one call per input set. Running the sets in turn keeps inputs out of
the caches, so a time is that of data from memory.

Each operator's cases stand in `benchmarks/cases/<op>.py`, in three sizes: "cuda" (real models),
"cpu" (what eager torch and the native library manage), "small" (tests).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

Size = Literal["cuda", "cpu", "small"]
SIZES: tuple[Size, ...] = get_args(Size)
Call = Callable[[], Any]
Calls = Sequence[Call]
"""The same computation on each input set."""


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Return `|result - exact| / |exact|`, some rows at a time to save memory."""
    wrong = total = 0.0
    for ours, theirs in zip(_rows(result), _rows(exact), strict=True):
        wrong += float((ours.float() - theirs.float()).square().sum(dtype=torch.float64))
        total += float(theirs.float().square().sum(dtype=torch.float64))
    return float((wrong / total) ** 0.5)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.reshape(-1, x.shape[-1]).split(64)


@dataclass(frozen=True)
class Contenders:
    """What competes in a case.

    Attributes:
        ours: the packed operator.
        baselines: what people run on uncompressed data, by name.
        exact: the baseline that computes what `ours` approximates, on the same first input set.
        max_error: bound of the error of `ours` against it; far above what the bits cost, to catch
            a wrong result rather than to measure a good one.
        error: how the error is measured.
    """

    ours: Calls
    baselines: Mapping[str, Calls]
    exact: str | None = None
    max_error: float = 1.0
    error: Callable[[Any, Any], float] = relative_error


@dataclass(frozen=True)
class Case:
    """One operator on one shape.

    Attributes:
        op: the operator.
        name: unique within the operator.
        shape: what to print, and what plots and tables select by.
        nbytes: bytes that have to be moved.
        flops: operations of the dense formula.
        memory: bytes on the device with all input sets of all contenders.
        make: allocates inputs and returns the calls.
        quick: whether `--quick` measures it.
        goal_ratio: least best baseline time / our time.
        goal_share: least share of the read ceiling.
    """

    op: str
    name: str
    shape: dict[str, Any]
    nbytes: int
    flops: int
    memory: int
    make: Callable[[torch.device], Contenders] = field(repr=False)
    quick: bool = False
    goal_ratio: float | None = None
    goal_share: float | None = None


TESTS: dict[str, tuple[str, ...]] = {
    "quantize": ("tests/ops/test_quantize.py",),
    "dequantize": ("tests/ops/test_dequantize.py",),
    "cache_append": ("tests/ops/test_cache_append.py",),
    "scores": ("tests/ops/test_scores.py",),
    "search": ("tests/ops/test_search.py",),
    "linear": ("tests/ops/test_scores.py", "tests/test_tensor_compute.py"),
    "decode_attention": ("tests/ops/test_decode_attention.py", "tests/llm/test_pages.py"),
    "extend_attention": ("tests/ops/test_attention.py", "tests/ops/test_merge.py"),
    "decode_layer": ("tests/ops/test_decode_attention.py", "tests/llm/test_pages.py"),
}
"""The tests that have to pass before an operator's times are printed."""

OPS = tuple(TESTS)


def cases(op: str, size: Size) -> list[Case]:
    """Return the cases of an operator."""
    return importlib.import_module(f"benchmarks.cases.{op}").cases(size)
