"""How vectors of a spec are spread over the threads of a GPU: measured rows, and what they give."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from quantforge.numerics.packing import planes
from quantforge.ops.kernels.layouts import Tile, lane_tile
from quantforge.ops.launch import capability
from quantforge.spec import QuantSpec, hadamard_base

PROGRAM_ELEMENTS = 4096
"""Numbers per program where the compiler places them."""


@dataclass(frozen=True)
class Tuning:
    """How many bits of a column number registers.

    Attributes:
        odd: the odd factor of the dim.
        width: greatest tile width: the dim, or the run of a dim with an odd factor.
        low_bits: the lowest bits, which make the width of a load.
        high_bits: the highest bits; with the low ones 2^(low + high) numbers of a run per thread.
        tiles: tiles per program where there are enough to fill the GPU.
        packs: the kernel it is for: one that packs codes, or that unpacks them; None: both.
    """

    odd: int
    width: int
    low_bits: int
    high_bits: int
    tiles: int
    packs: bool | None = None


# One warp a program. Chosen by instructions per element of the loop over tiles (SASS of sm_90,
# Triton 3.6, 4 bits, bfloat16, no statistics), of which a multiprocessor issues 128 a cycle, less
# the branch of extreme vectors (4.4); shuffles among them, of which it does 32; registers:
#
#                      dim 128          dim 768           dim 1536
#     quantize         28.6, 4.6, 128   30.0, 5.5, 168    32.5, 6.5, 168
#     dequantize       11.7, 2.0,  64   13.5, 2.5,  96    14.6, 3.0,  96
#
# Rows of odd=3 are the fastest of those timed on an NVIDIA H200 (Triton 3.6.0, 2026-11-24): at dim
# 768, bfloat16, 4 bits, quantize 43% of the read ceiling (41% with low_bits=3), float32 73% (53%);
# dequantize 87% (80% with 4 tiles). At dim 1536 40% (36%) and 83% (79%). Dim 128: 37% and 66%.
# Timed as variants; as the default they have not run on a GPU yet.
TUNING = (
    Tuning(odd=1, width=1024, low_bits=3, high_bits=2, tiles=8),
    Tuning(odd=1, width=2048, low_bits=3, high_bits=3, tiles=4),
    Tuning(odd=3, width=64, low_bits=2, high_bits=0, tiles=4, packs=True),
    Tuning(odd=3, width=256, low_bits=2, high_bits=0, tiles=2, packs=True),
    Tuning(odd=3, width=256, low_bits=3, high_bits=0, tiles=1, packs=False),
    Tuning(odd=5, width=128, low_bits=2, high_bits=0, tiles=4),
    Tuning(odd=5, width=256, low_bits=3, high_bits=0, tiles=4),
    Tuning(odd=7, width=128, low_bits=2, high_bits=0, tiles=4),
)


@dataclass(frozen=True)
class Placement:
    """Where the numbers of a tile are.

    Attributes:
        width: columns of a tile: the dim, or the run of a dim with an odd factor.
        tile: how its columns are spread.
        tiles: tiles per program.
    """

    width: int
    tile: Tile
    tiles: int


def odd_factor(dim: int) -> int:
    """Return 1, 3, 5 or 7: the odd factor of a dim that has a Hadamard rotation."""
    base = hadamard_base(dim)
    assert base is not None, "QuantSpec admits only dims that have a Hadamard rotation"
    return max(base // 4, 1)


@lru_cache(maxsize=256)
def placement(dim: int, narrowest: int, device: torch.device, packs: bool) -> Placement:
    """Return the placement of vectors whose narrowest plane has some bits per field."""
    odd = odd_factor(dim)
    width = dim if odd == 1 else dim // (4 * odd)
    if odd == 1:  # fields of a byte must lie in one thread; they are dim / 8 apart at least
        least = {1: 3, 2: 2, 4: 1, 8: 0}[narrowest]
    else:  # they are whole runs apart, or half ones
        least = 1 if narrowest == 1 else 0
    for row in TUNING:
        if capability(device)[0] < 7 or odd != row.odd or width > row.width:
            continue
        if row.packs not in (None, packs):
            continue
        high = max(row.high_bits, least)
        low = max(row.low_bits + row.high_bits - high, 1)
        tile = lane_tile(width, low, high, 1)
        if tile is not None:
            return Placement(width, tile, row.tiles)
    padded = width * (1 if odd == 1 else 32)
    return Placement(width, Tile(max(1, PROGRAM_ELEMENTS // padded), num_warps=4), 1)


def placement_of(spec: QuantSpec, device: torch.device, *, packs: bool) -> Placement:
    """Return the placement of a spec's vectors for a kernel that packs codes, or unpacks them."""
    if spec.estimator == "prod" or (packs and odd_factor(spec.dim) == 1):
        # three upper bits in registers: sums are over 4 numbers of a thread when they reach lanes
        return placement(spec.dim, 1, device, packs)
    narrowest = min(p.width for p in planes(spec.dim, spec.code_bits))
    return placement(spec.dim, narrowest, device, packs)
