"""Codes by lookup: uniform cells with one boundary at most.

    cell(u) = round(u * slope)                     monotone in u
    code(u) = below[cell] + (u > boundary[cell])

Rounding is an addition: in [2^23, 2^24) float32 has a step of 1, so adding 1.5 * 2^23 leaves the
cell in the low bits, in two's complement. The table covers every |u| <= sqrt(dim), cells counted
modulo its size, so a NaN finds some entry too. Boundaries keep clear of the edges of cells: it does
not matter whether the product is rounded before the addition.

Nearly all u of a 4-bit code fall into 23 cells of 4 bytes, one for each bank: lanes of a warp do
not wait for each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from quantforge.numerics.codebook import codebook_of
from quantforge.ops.constants import cached_constant
from quantforge.spec import QuantSpec

_CLEARANCE = 1e-3
"""Least distance of a boundary from the edge of its cell, in cells: 30 times the rounding error."""


@dataclass(frozen=True, eq=False)
class CellTable:
    """Lookup table of a codebook.

    Attributes:
        slope: cells per unit of u.
        size: cells, a power of two.
        table: (2 size + 2^bits,) float32: boundary of each cell (infinity for none), boundaries
            below each cell (int32 bits), centroids.
    """

    slope: float
    size: int
    table: torch.Tensor


def cell_table(
    boundaries: np.ndarray, centroids: np.ndarray, end: float
) -> tuple[float, int, np.ndarray]:
    """Return slope, size and table for |u| <= end: wide cells that hold one boundary each."""
    bounds = boundaries.astype(np.float64)
    gap = float(np.diff(bounds).min()) if len(bounds) > 1 else 1.0
    slope = 0.75 / gap
    while True:
        slope = float(np.float32(slope * 1.002))
        cell = np.rint(bounds * slope)
        clear = np.abs(bounds * slope - cell).max() < 0.5 - _CLEARANCE
        if clear and len(np.unique(cell)) == len(cell):
            break
    home = cell.astype(np.int64)
    reach = max(float(np.abs(bounds).max()), end) * slope
    size = 1 << (2 * math.ceil(reach) + 3).bit_length()
    cells = np.arange(size)
    cells = np.where(cells < size // 2, cells, cells - size)
    boundary = np.full(size, np.inf, np.float32)
    boundary[home % size] = boundaries
    below = np.searchsorted(home, cells, side="left").astype(np.int32).view(np.float32)
    return slope, size, np.concatenate([boundary, below, centroids.astype(np.float32)])


@cached_constant
def cells_of(spec: QuantSpec, device: torch.device) -> CellTable:
    """Return the lookup table of a spec's codebook on a device."""
    codebook = codebook_of(spec)
    end = 1.01 * math.sqrt(spec.dim)
    slope, size, table = cell_table(codebook.boundaries, codebook.centroids, end)
    return CellTable(slope, size, torch.from_numpy(table).to(device))


@triton.jit
def nearest(u, table_ptr, SLOPE: tl.constexpr, CELLS: tl.constexpr):
    """Return the code of each u (int32) and its centroid.

    Instructions per element: fma, and, address, 2 loads, subtract, shift-and-add; address, load.
    """
    cell = tl.fma(u, SLOPE, 12582912.0)
    cell = cell.to(tl.int32, bitcast=True) & (CELLS - 1)
    boundary = tl.load(table_ptr + cell)
    below = tl.load(table_ptr + cell + CELLS).to(tl.uint32, bitcast=True)
    is_above = (boundary - u).to(tl.uint32, bitcast=True) >> 31  # never -0
    code = (below + is_above).to(tl.int32)
    return code, tl.load(table_ptr + 2 * CELLS + code)
