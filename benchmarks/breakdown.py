"""Where the time of a decode step goes: attention, cache append, linear layers, gaps.

An eager step is divided by scopes around `F.scaled_dot_product_attention`, `F.linear` and the
cache's `update`: a kernel belongs to the scope it was launched in. A compiled step replays a graph
without scopes, so its kernels are told apart by name; the largest are listed with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function

ATTENTION, APPEND, LINEAR, OTHER = "attention", "append", "linear", "other"
SCOPES = (ATTENTION, APPEND, LINEAR)
FUNCTIONS = {F.scaled_dot_product_attention: ATTENTION, F.linear: LINEAR}
KERNEL_NAMES = (
    (
        ATTENTION,
        re.compile(r"flash|fmha|sdpa|attention|decode_kernel|merge_kernel", re.IGNORECASE),
    ),
    (APPEND, re.compile(r"index_copy|index_put|_append|CatArray", re.IGNORECASE)),
    (LINEAR, re.compile(r"gemm|gemv|nvjet|cutlass|cublas|splitk|_mm_", re.IGNORECASE)),
)
LISTED = 12


class _Scopes(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        scope = FUNCTIONS.get(func)
        if scope is None:
            return func(*args, **(kwargs or {}))
        with record_function(scope):
            return func(*args, **(kwargs or {}))


@contextmanager
def scopes(cache: Any) -> Iterator[None]:
    """Mark what runs inside: attention, linear layers, and the updates of a cache."""
    update = cache.update

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(APPEND):
            return update(*args, **kwargs)

    cache.update = marked
    try:
        with _Scopes():
            yield
    finally:
        del cache.update  # the method of the class shows again


def breakdown(
    step: Callable[[], Any], cache: Any, step_ms: float, *, compiled: bool, steps: int = 3
) -> dict[str, Any]:
    """Return times per step in ms: of each part, busy, and the gap to `step_ms`, measured before.

    Without a GPU, times are those of the CPU inside the scopes.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities, acc_events=True) as trace:
        if compiled:
            for _ in range(steps):
                step()
        else:
            with scopes(cache):
                for _ in range(steps):
                    step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = trace.events()
    kernels = [event for event in events if _is_kernel(event)]
    if not kernels:
        return _of_cpu(events, step_ms, steps)
    parts = _by_name(kernels) if compiled else _by_scope(events, kernels)
    busy = sum(parts.values())
    names: Counter[str] = Counter()
    for kernel in kernels:
        names[kernel.name[:120]] += kernel.time_range.elapsed_us()
    per_step = 1e3 * steps
    return {
        "parts_ms": {name: round(us / per_step, 4) for name, us in parts.items()},
        "busy_ms": round(busy / per_step, 4),
        "gap_ms": round(max(0.0, step_ms - busy / per_step), 4),
        "launches": round(len(kernels) / steps),
        "kernels": [[name, round(us / per_step, 4)] for name, us in names.most_common(LISTED)],
    }


def _is_kernel(event: Any) -> bool:
    """Return whether an event ran on the GPU: a kernel, copy or fill, not the shadow of a scope."""
    shadow = getattr(event, "is_user_annotation", False) or event.name in SCOPES
    return event.device_type == DeviceType.CUDA and not shadow


def _scope_of(event: Any) -> str | None:
    """Return the outermost scope of an event of the CPU."""
    found = None
    while event is not None:
        found = event.name if event.name in SCOPES else found
        event = event.cpu_parent
    return found


def _by_scope(events: Any, kernels: list[Any]) -> dict[str, float]:
    parts = dict.fromkeys((*SCOPES, OTHER), 0.0)
    for event in events:
        if event.device_type == DeviceType.CPU and event.kernels:
            scope = _scope_of(event)
            if scope is not None:
                durations = [k.duration for k in event.kernels if k.name not in SCOPES]
                parts[scope] += sum(durations)
    total = sum(kernel.time_range.elapsed_us() for kernel in kernels)
    parts[OTHER] = max(0.0, total - sum(parts.values()))
    return parts


def _by_name(kernels: list[Any]) -> dict[str, float]:
    parts = dict.fromkeys((*SCOPES, OTHER), 0.0)
    for kernel in kernels:
        part = next((part for part, name in KERNEL_NAMES if name.search(kernel.name)), OTHER)
        parts[part] += kernel.time_range.elapsed_us()
    return parts


def _of_cpu(events: Any, step_ms: float, steps: int) -> dict[str, Any]:
    parts = dict.fromkeys(SCOPES, 0.0)
    for event in events:
        if event.name in SCOPES and _scope_of(event.cpu_parent) is None:
            parts[event.name] += event.cpu_time_total
    parts_ms = {name: round(us / 1e3 / steps, 4) for name, us in parts.items() if us}
    return {"parts_ms": parts_ms, "busy_ms": None, "gap_ms": None, "launches": None, "kernels": []}
