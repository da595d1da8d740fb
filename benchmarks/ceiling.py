"""What the memory of a device can do: the read ceiling, and a copy.

Every share in the tables is bytes / time / read ceiling, both measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.cases.inputs import normal
from benchmarks.timing import measure

READ_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}


def ceilings(device: torch.device, nbytes: int | None = None) -> dict[str, float]:
    """Return `read_gbps` and `copy_gbps` (read + write), in 1e9 bytes per second.

    Reading is the better of torch's sum and, on CUDA, a Triton reduction.
    """
    nbytes = READ_BYTES[device.type] if nbytes is None else nbytes
    x = normal((nbytes // 4,), torch.float32, device, seed=0)
    half = x.numel() // 2
    readers: dict[str, list[Callable[[], Any]]] = {"torch": [x.sum]}
    if device.type == "cuda":
        from benchmarks.kernels import read_all

        readers["triton"] = [partial(read_all, x)]
    times = measure({**readers, "copy": [partial(x[:half].copy_, x[half:])]}, device)
    read_us = min(times[name].time_us for name in readers)
    copied = 2 * half * 4
    return {
        "read_gbps": round(x.numel() * 4 / read_us / 1e3, 1),
        "copy_gbps": round(copied / times["copy"].time_us / 1e3, 1),
    }
