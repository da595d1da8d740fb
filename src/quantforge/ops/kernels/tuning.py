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
    """How many bits of a channel number registers.

    Attributes:
        odd: the odd factor of the dim.
        width: greatest tile width (the dim, or the next power of two).
        low_bits: the lowest bits, which make the width of a load.
        high_bits: the highest bits; with the low ones 2^(low + high) numbers of a row per thread.
        num_warps: warps per program.
        tiles: tiles per program where there are enough to fill the GPU.
    """

    odd: int
    width: int
    low_bits: int
    high_bits: int
    num_warps: int
    tiles: int


# Untuned: chosen by the instructions per element of the loop over tiles (SASS of sm_90, Triton 3.6,
# 4 bits, no statistics), of which a multiprocessor issues 128 a cycle; registers per thread:
#
#                      dim 128   dim 768   dim 1024   dim 1536
#     quantize         30, 128   48, 168    37, 168    52, 168
#     dequantize       18,  95   30,  96    24,  96    33, 127
TUNING = (
    Tuning(odd=1, width=1024, low_bits=3, high_bits=2, num_warps=4, tiles=8),
    Tuning(odd=1, width=2048, low_bits=3, high_bits=3, num_warps=4, tiles=4),
    Tuning(odd=3, width=2048, low_bits=3, high_bits=3, num_warps=4, tiles=4),
    Tuning(odd=5, width=2048, low_bits=2, high_bits=4, num_warps=4, tiles=4),
    Tuning(odd=7, width=2048, low_bits=2, high_bits=4, num_warps=4, tiles=4),
)


@dataclass(frozen=True)
class Placement:
    """Where the numbers of a tile are.

    Attributes:
        width: columns of the tile: the dim, or the next multiple of its power of two that is a
            power of two.
        tile: flat, by channel.
        runs: of the rotation of a dim with an odd factor: (rows, 4 groups).
        tiles: tiles per program.
    """

    width: int
    tile: Tile
    runs: Tile | None
    tiles: int


def odd_factor(dim: int) -> int:
    """Return 1, 3, 5 or 7: the odd factor of a dim that has a Hadamard rotation."""
    base = hadamard_base(dim)
    assert base is not None, "QuantSpec admits only dims that have a Hadamard rotation"
    return max(base // 4, 1)


@lru_cache(maxsize=256)
def placement(dim: int, narrowest: int, device: torch.device) -> Placement:
    """Return the placement of vectors whose narrowest plane has some bits per field."""
    odd = odd_factor(dim)
    width = dim // odd * (1 << (odd - 1).bit_length())
    for row in TUNING:
        if capability(device)[0] < 7 or odd != row.odd or width > row.width:
            continue
        # fields of a byte must lie in one thread; they are an eighth of the vector apart at most
        chunk_bits = (odd - 1).bit_length()
        slot_bits = {1: 3, 2: 2, 4: 1, 8: 0}[narrowest]
        high = max(row.high_bits, chunk_bits + slot_bits)
        low = max(row.low_bits + row.high_bits - high, 1)
        tile = lane_tile(width, low, high, row.num_warps)
        if tile is None:
            continue
        if odd == 1:
            return Placement(width, tile, None, row.tiles)
        group_bits = (dim // (4 * odd)).bit_length() - 1
        low = group_bits + 2 - tile.lane_bits
        runs = lane_tile(4 << group_bits, low, 0, row.num_warps, reverse_rows=True)
        if runs is not None and runs.rows == tile.rows:
            return Placement(width, tile, runs, row.tiles)
    anywhere = Tile(max(1, PROGRAM_ELEMENTS // width), num_warps=4)
    return Placement(width, anywhere, None if odd == 1 else anywhere, 1)


def placement_of(spec: QuantSpec, device: torch.device, *, packs: bool) -> Placement:
    """Return the placement of a spec's vectors for a kernel that packs codes, or unpacks them.

    With an odd factor unpacking reads each byte where it is needed, so any placement will do.
    """
    odd = odd_factor(spec.dim)
    if not packs and odd > 1:
        return placement(spec.dim, 8, device)
    if spec.estimator == "prod" or (packs and odd == 1):
        # three upper bits in registers: sums are over 4 numbers of a thread when they reach lanes
        return placement(spec.dim, 1, device)
    return placement(spec.dim, min(p.width for p in planes(spec.dim, spec.code_bits)), device)
