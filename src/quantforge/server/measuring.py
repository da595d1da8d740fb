"""Operations that measure the vectors of a request: benchmark and optimize."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quantforge.config import QuantForgeConfig
from quantforge.errors import InputError
from quantforge.measure import measure
from quantforge.optimizer import Space, optimize
from quantforge.server.work import Answer, Operation, Progress

MIN_FOR_RECALL = 20
MAX_QUERIES = 64
GREATEST = 1e16
"""Of a number, so that float32 holds the squared norm."""


def benchmark(x: np.ndarray, configs: list[QuantForgeConfig], device: str) -> Operation:
    """Measure each config on vectors (n, dim), float32, as `quantforge.measure.measure` does.

    Queries are the last tenth of the vectors, 64 at most, and are not among those searched.

    Raises:
        InputError: for no vectors, NaN, infinity or huge numbers.
    """
    _check(x)
    held = min(MAX_QUERIES, len(x) // 10) if len(x) >= MIN_FOR_RECALL else 0
    data, queries = torch.from_numpy(x[: len(x) - held]), torch.from_numpy(x[len(x) - held :])

    def run(progress: Progress) -> Answer:
        rows = []
        for i, config in enumerate(configs):
            progress(i / len(configs))
            rows.append(measure(data.to(device), queries.to(device), config).to_dict())
        return {"dim": x.shape[1], "queries": held, "device": device, "rows": rows}

    return run


def optimization(x: np.ndarray, options: dict[str, Any], device: str) -> tuple[Operation, int]:
    """Find settings for vectors (n, dim), float32, as `quantforge.optimizer.optimize` does.

    Returns:
        The operation, and how many numbers it codes in all.

    Raises:
        InputError: for no vectors, NaN, infinity or huge numbers.
    """
    _check(x)
    points = len(Space().points(x.shape[1], options["metric"], options["seed"]))

    def run(progress: Progress) -> Answer:
        measured = 0

        def count(_: str) -> None:
            nonlocal measured
            progress(measured / (points + 1))
            measured += 1

        return optimize(x, device=device, progress=count, **options).to_dict()

    return run, points * min(len(x), options["sample"]) * x.shape[1]


def _check(x: np.ndarray) -> None:
    greatest = float(np.abs(x).max(initial=0))  # NaN if there is one
    if not x.size or not greatest <= GREATEST:
        got = f"the shape {x.shape} and {greatest:g}"
        raise InputError(
            f"to be measured, vectors must hold numbers of at most {GREATEST:g}; got {got}; "
            "remove what is not finite, or scale them"
        )
