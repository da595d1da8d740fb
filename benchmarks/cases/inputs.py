"""Random inputs, the number of input sets, and the bytes of packed vectors."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod, sqrt
from typing import TypeVar

import torch

from quantforge.numerics.packing import packed_width
from quantforge.ops.quantize import op as quantize_op
from quantforge.spec import QuantSpec

T = TypeVar("T")
Packed = tuple[torch.Tensor, torch.Tensor]

ROTATION_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}
"""Input sets together: forty times the L2 of an H200 (50 MB), four times a CPU's share of L3."""
MAX_SETS = {"cuda": 64, "cpu": 8}
CHUNK_NUMBERS = 1 << 28
"""Numbers made and quantized at a time: 512 MiB of bfloat16."""
DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def sets(nbytes: int, device: torch.device | str) -> int:
    """Return how many input sets of `nbytes` keep the inputs out of the caches."""
    kind = torch.device(device).type
    return min(max(1, ceil(ROTATION_BYTES[kind] / nbytes)), MAX_SETS[kind])


def rotated(make: Callable[[int], T], nbytes: int, device: torch.device) -> list[T]:
    """Return the input sets `make(0)`, `make(1)`, ... of `nbytes` each."""
    return [make(seed) for seed in range(sets(nbytes, device))]


def rotation_bytes(nbytes: int, device: torch.device | str) -> int:
    """Return the bytes of all input sets."""
    return nbytes * sets(nbytes, device)


def normal(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int
) -> torch.Tensor:
    """Return normal numbers, the same for a seed in every contender of a case.

    The generator is its own: a CUDA graph capture that fails leaves torch's default one unusable.
    """
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(shape, dtype=dtype, device=device)
    flat = out.view(-1)
    for start in range(0, flat.numel(), CHUNK_NUMBERS):
        flat[start : start + CHUNK_NUMBERS].normal_(generator=generator)
    return out


def pack(x: torch.Tensor, spec: QuantSpec) -> Packed:
    """Quantize x (..., dim) some rows at a time, as a large store is built."""
    rows = x.reshape(-1, spec.dim)
    packed = x.new_empty((len(rows), packed_width(spec)), dtype=torch.uint8)
    scale_dtype = getattr(torch, spec.scale_dtype)
    scales = x.new_empty((len(rows), spec.scales_per_vector), dtype=scale_dtype)
    step = max(1, CHUNK_NUMBERS // 4 // spec.dim)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        packed[part], scales[part] = quantize_op.quantize(rows[part], None, None, spec.key)
    lead = x.shape[:-1]
    return packed.view(*lead, -1), scales.view(*lead, -1)


def row_nbytes(spec: QuantSpec) -> int:
    """Return the bytes of one packed vector with its scales."""
    return packed_width(spec) + spec.scales_per_vector * getattr(torch, spec.scale_dtype).itemsize


def dense_nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of a dense tensor."""
    return prod(shape) * dtype.itemsize


def code_error(bits: int) -> float:
    """Return the relative error of unbiased codes: sqrt(D / (1 - D)), D the distortion."""
    distortion = DISTORTION[bits] if bits in DISTORTION else DISTORTION[4] * 4.0 ** (4 - bits)
    return sqrt(distortion / (1 - distortion))
