"""One case: make its inputs, check its results, time its contenders, and say it in a row."""

from __future__ import annotations

import gc
import platform
from typing import Any

import torch

from benchmarks.registry import Calls, Case, Contenders
from benchmarks.timing import measure

OURS = "ours"
SPARE_BYTES = 2 << 30
"""Left for workspaces, decoded tiles and the CUDA context."""


class WrongResultError(Exception):
    """An operator whose result cannot be right: it has no time."""


def free_bytes(device: torch.device) -> int:
    """Return the memory that a case may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] - SPARE_BYTES
    if platform.system() != "Linux":
        return 4 << 30
    with open("/proc/meminfo") as lines:
        available = next(line for line in lines if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024


def release(device: torch.device) -> None:
    """Give back what the last case held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_case(
    case: Case, device: torch.device, ceilings: dict[str, float], repetitions: int = 30
) -> dict[str, Any]:
    """Return the row of a case; it says why where there is no time.

    Raises:
        WrongResultError: if the result is not finite, or too far from the exact baseline's.
    """
    row: dict[str, Any] = {"op": case.op, "case": case.name, "shape": case.shape}
    release(device)
    free = free_bytes(device)
    if case.memory > free:
        needed, have = case.memory / 2**30, free / 2**30
        return row | {"skipped": f"needs {needed:.1f} GiB, {have:.1f} are free"}
    try:
        return row | _measured(case, device, ceilings, repetitions)
    except torch.cuda.OutOfMemoryError as error:
        return row | {"skipped": f"out of memory: {str(error).splitlines()[0]}"}


def _measured(
    case: Case, device: torch.device, ceilings: dict[str, float], repetitions: int
) -> dict[str, Any]:
    contenders = case.make(device)
    result = contenders.ours[0]()
    _check_finite(case, result)
    baselines, unavailable, exact = _available(contenders)
    error = None if exact is None else _check_error(case, contenders, result, exact)
    del result, exact
    times = measure({OURS: contenders.ours, **baselines}, device, repetitions)
    ours_us = times[OURS].time_us
    row: dict[str, Any] = {
        **times[OURS].as_dict(),
        "bytes": case.nbytes,
        "flops": case.flops,
        "gbps": round(case.nbytes / ours_us / 1e3, 1),
        "tflops": round(case.flops / ours_us / 1e6, 3),
        **ceilings,
        "share": round(case.nbytes / ours_us / 1e3 / ceilings["read_gbps"], 4),
        "baselines": {name: times[name].as_dict() for name in baselines},
        "unavailable": unavailable,
        "error": error,
        "goal_ratio": case.goal_ratio,
        "goal_share": case.goal_share,
    }
    if baselines:
        best = min(baselines, key=lambda name: times[name].time_us)
        row |= {"best": best, "ratio": round(times[best].time_us / ours_us, 3)}
    return row


def _available(
    contenders: Contenders,
) -> tuple[dict[str, Calls], dict[str, str], Any]:
    """Return the baselines that run here, why the others do not, and the exact one's result."""
    found: dict[str, Calls] = {}
    unavailable: dict[str, str] = {}
    exact = None
    for name, calls in contenders.baselines.items():
        try:
            result = calls[0]()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a kernel of torch that refuses this shape or GPU
            unavailable[name] = str(error).splitlines()[0]
            continue
        found[name] = calls
        if name == contenders.exact:
            exact = result
    return found, unavailable, exact


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for t in result or () if isinstance(t, torch.Tensor)]


def _check_finite(case: Case, result: Any) -> None:
    for t in _tensors(result):
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise WrongResultError(f"{case.op}, {case.name}: NaN or infinity in the result")


def _check_error(case: Case, contenders: Contenders, result: Any, exact: Any) -> float:
    error = contenders.error(result, exact)
    if error > contenders.max_error:
        raise WrongResultError(
            f"{case.op}, {case.name}: an error of {error:.3f} against {contenders.exact}, "
            f"at most {contenders.max_error:.3f} expected"
        )
    return round(error, 5)
