"""Times that say how much they may be trusted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

RUNS = 5


@dataclass(frozen=True)
class Latency:
    """Time of one call, several times.

    Attributes:
        median_ms: of the runs.
        spread_ms: greatest less least.
    """

    median_ms: float
    spread_ms: float


def latency(call: Callable[[], Any], device: torch.device, runs: int = RUNS) -> Latency:
    """Return the time of a call that waits for its device, after one call to warm up."""
    times = []
    for run in range(runs + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        if run:
            times.append(1e3 * (time.perf_counter() - start))
    return Latency(statistics.median(times), max(times) - min(times))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def why_no_latency(measured: Sequence[Latency]) -> str | None:
    """Return why times do not tell settings apart, or None: their noise exceeds their difference.

    Compares the difference of the slowest and the fastest median with the median spread of runs.
    """
    medians = [found.median_ms for found in measured]
    difference = max(medians) - min(medians)
    spread = statistics.median(found.spread_ms for found in measured)
    if spread < difference:
        return None
    return (
        f"latency is left out: runs of one setting differ by {spread:.3g} ms, settings by "
        f"{difference:.3g} ms"
    )
