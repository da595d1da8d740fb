"""Median time of a call, for several contenders at once.

On CUDA the calls on all input sets are captured into one graph per contender, which is replayed
between two events: launches cost nothing, and data comes from memory because the sets rotate.
What cannot be captured is launched directly between the events. Contenders take turns, so that a
change of clocks meets all of them. On CPU a clock stands in for the events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch

from benchmarks.registry import Calls

BATCH_US = 4000.0
"""What a graph should take at least, so that its own launch does not count."""
MAX_CALLS = 256
"""Calls in a graph, unless there are more input sets: few enough to capture quickly."""
BUDGET_S = 2.0
"""Seconds that a contender may take; it limits the repetitions of slow ones."""
MIN_REPETITIONS = 5


@dataclass(frozen=True)
class Timing:
    """The time of one call.

    Attributes:
        time_us: median over repetitions.
        low_us: the fastest repetition.
        high_us: the slowest.
        repetitions: how often all input sets were run.
        calls: calls in one repetition.
        how: "graph", "events" or "clock".
    """

    time_us: float
    low_us: float
    high_us: float
    repetitions: int
    calls: int
    how: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, rounded to 0.01 us."""
        return {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class _Batch:
    run: Callable[[], None]
    calls: int
    how: str


def measure(
    contenders: Mapping[str, Calls], device: torch.device, repetitions: int = 30
) -> dict[str, Timing]:
    """Return the time of each contender; its calls are one computation on several input sets."""
    prepare, clock = (_graph, _event_us) if device.type == "cuda" else (_plain, _clock_us)
    batches = {name: prepare(calls) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in batches}
    limits = {}
    for name, batch in batches.items():
        batch.run()  # a first replay uploads the graph
        affordable = int(BUDGET_S * 1e6 / max(clock([batch])[0], 1.0))
        limits[name] = min(repetitions, max(MIN_REPETITIONS, affordable))
    for repetition in range(max(limits.values())):
        turn = [name for name in batches if len(times[name]) < limits[name]]
        first = repetition % len(turn)  # nobody always runs behind the same neighbour
        turn = turn[first:] + turn[:first]
        for name, spent in zip(turn, clock([batches[name] for name in turn]), strict=True):
            times[name].append(spent)
    return {
        name: Timing(
            statistics.median(spent) / batches[name].calls,
            min(spent) / batches[name].calls,
            max(spent) / batches[name].calls,
            len(spent),
            batches[name].calls,
            batches[name].how,
        )
        for name, spent in times.items()
    }


def _plain(calls: Calls, how: str = "clock") -> _Batch:
    def run() -> None:
        for call in calls:
            call()

    run()  # compiles kernels, makes constants and handles
    return _Batch(run, len(calls), how)


def _clock_us(batches: list[_Batch]) -> list[float]:
    times = []
    for batch in batches:
        start = time.perf_counter()
        batch.run()
        times.append(1e6 * (time.perf_counter() - start))
    return times


def _event_us(batches: list[_Batch]) -> list[float]:
    marks = []
    for batch in batches:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        batch.run()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in marks]


def _graph(calls: Calls) -> _Batch:
    """Return a batch that replays a graph, or launches the calls where they cannot be captured."""
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # capture wants its warm-up on a stream of its own
        plain = _plain(calls, "events")
    current.wait_stream(side)
    torch.cuda.synchronize()
    once = _event_us([plain])[0]
    rounds = max(1, ceil(min(BATCH_US / once, MAX_CALLS / len(calls))))
    graph = torch.cuda.CUDAGraph()
    try:
        # capture_end raises after a failed capture and leaves the capturing stream current
        with torch.cuda.stream(current), torch.cuda.graph(graph):
            for _ in range(rounds):
                plain.run()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:  # a call that waits for the device, say
        torch.cuda.synchronize()
        return plain
    return _Batch(graph.replay, len(calls) * rounds, "graph")
