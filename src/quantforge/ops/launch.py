"""What every Triton launcher needs: whether kernels can run, on what, and how wide.

Importing this module imports triton; only `triton.py` modules of operators do.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

INTERPRET = bool(triton.knobs.runtime.interpret)
"""Whether kernels were decorated for the interpreter (`TRITON_INTERPRET=1` at import)."""


def cannot_run_on(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on a device, or None."""
    if device.type == "cuda" or INTERPRET:
        return None
    return f"Triton kernels need a GPU (or TRITON_INTERPRET=1), the tensors are on {device}"


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU; (0, 0) elsewhere."""
    if device.type != "cuda" or torch.version.hip:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors, 4 under the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
