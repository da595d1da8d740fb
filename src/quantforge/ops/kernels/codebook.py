"""Codes by lookup: uniform cells with one boundary at most.

    cell(u) = round(u * slope)                     monotone in u
    code(u) = below[cell] + (u > boundary[cell])

Rounding is an addition: in [2^23, 2^24) float32 has a step of 1, so adding 1.5 * 2^23 leaves the
cell in the low bits, in two's complement. The table covers every |u| <= sqrt(dim), cells counted
modulo its size, so a NaN finds some entry too. Boundaries keep clear of the edges of cells: it does
not matter whether the product is rounded before the addition.

A code of few bits needs 31 cells once u is clamped to where the boundaries are, and these lie in
the registers of a warp, one in each lane: a lookup is a shuffle, which computes no address. As the
last bits of a boundary are the number of those below, one shuffle finds both; a cell without a
boundary holds a large number with such bits. Bits above those of the code are left in the result.

    cell(u) = round(30 * saturate(u * slope / 30 + 1/2))
    word    = cells[cell]
    code(u) = word + (u > word)                    modulo 2^bits
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from quantforge.numerics.codebook import codebook_of
from quantforge.ops.constants import cached_constant
from quantforge.spec import QuantSpec

F64 = NDArray[np.float64]

_CLEARANCE = 1e-3
"""Least distance of a boundary from the edge of its cell, in cells: 30 times the rounding error."""

_LANES, _LANE_CELLS = 32, 30
"""Entries in the lanes of a warp, and the greatest cell: an even number, as 0 is a boundary."""

MAX_LANE_BITS = 5
"""Up to here the lanes of a warp hold all centroids."""

_NO_BOUNDARY = 0x7F000000
"""Bits of 2^127, which nothing exceeds: |u| <= sqrt(dim)."""


@dataclass(frozen=True, eq=False)
class CellTable:
    """Lookup table of a codebook.

    Attributes:
        slope: cells per unit of u.
        size: cells, a power of two; None for the 31 that lie in lanes, of clamped u.
        table: (2 size + 2^bits,) float32: boundary of each cell (infinity for none), boundaries
            below each cell (int32 bits), centroids. Of lanes, 32 words and 32 centroids.
    """

    slope: float
    size: int | None
    table: torch.Tensor


def is_clear(position: F64) -> bool:
    """Return whether boundaries, at positions in cells, have a cell each and avoid its edges."""
    cell = np.rint(position)
    near = np.abs(position - cell).max() < 0.5 - _CLEARANCE
    return bool(near) and len(np.unique(cell)) == len(cell)


def first_slope(boundaries: F64) -> float:
    """Return a number of cells per unit that is too small, or hardly enough."""
    return 0.75 / (float(np.diff(boundaries).min()) if len(boundaries) > 1 else 1.0)


def cell_table(
    boundaries: np.ndarray, centroids: np.ndarray, end: float
) -> tuple[float, int, np.ndarray]:
    """Return slope, size and table for |u| <= end: wide cells that hold one boundary each."""
    bounds = boundaries.astype(np.float64)
    slope = first_slope(bounds)
    while not is_clear(bounds * slope):
        slope = float(np.float32(slope * 1.002))
    home = np.rint(bounds * slope).astype(np.int64)
    reach = max(float(np.abs(bounds).max()), end) * slope
    size = 1 << (2 * math.ceil(reach) + 3).bit_length()
    cells = np.arange(size)
    cells = np.where(cells < size // 2, cells, cells - size)
    boundary = np.full(size, np.inf, np.float32)
    boundary[home % size] = boundaries
    below = np.searchsorted(home, cells, side="left").astype(np.int32).view(np.float32)
    return slope, size, np.concatenate([boundary, below, centroids.astype(np.float32)])


def lane_table(boundaries: np.ndarray, centroids: np.ndarray) -> tuple[float, np.ndarray] | None:
    """Return slope and table of 31 cells in the lanes of a warp, None if they are not enough."""
    bounds = boundaries.astype(np.float64)
    slope = first_slope(bounds)
    while np.abs(bounds).max() * slope < _LANE_CELLS / 2:
        if is_clear(bounds * slope):
            home = np.rint(bounds * slope).astype(np.int64) + _LANE_CELLS // 2
            below = np.searchsorted(home, np.arange(_LANES), side="left").astype(np.int32)
            word = (below | _NO_BOUNDARY).view(np.float32)
            word[home] = boundaries
            repeated = np.resize(centroids.astype(np.float32), _LANES)
            return slope, np.concatenate([word, repeated])
        slope = float(np.float32(slope * 1.002))
    return None


@cached_constant
def cells_of(spec: QuantSpec, device: torch.device) -> CellTable:
    """Return the lookup table of a spec's codebook on a device."""
    codebook = codebook_of(spec)
    end = 1.01 * math.sqrt(spec.dim)
    slope, size, table = cell_table(codebook.boundaries, codebook.centroids, end)
    return CellTable(slope, size, torch.from_numpy(table).to(device))


@cached_constant
def lane_cells_of(spec: QuantSpec, device: torch.device) -> CellTable:
    """Return a table that lies in lanes if there is one, else that of `cells_of`."""
    codebook = codebook_of(spec)
    found = lane_table(codebook.boundaries, codebook.centroids)
    if found is None:
        return cells_of(spec, device)
    return CellTable(found[0], None, torch.from_numpy(found[1]).to(device))


@cached_constant
def centroids_of_lanes(spec: QuantSpec, device: torch.device) -> torch.Tensor:
    """Return up to 32 centroids, repeated to 32 float32."""
    repeated = np.resize(codebook_of(spec).centroids.astype(np.float32), _LANES)
    return torch.from_numpy(repeated).to(device)


@triton.jit
def lookup_table(table_ptr, CELLS: tl.constexpr):
    """Return what `nearest` looks up in: the table, or what a lane holds of it.

    To the compiler that is a scalar, though it is a different number in each lane.
    """
    if CELLS is None:
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1
        )
        table = (tl.load(table_ptr + lane), tl.load(table_ptr + 32 + lane))
    else:
        table = table_ptr
    return table


@triton.constexpr_function
def lane_lookup(slope: float) -> str:
    """Return assembly: code $0 and centroid $1 of u $2, by the lane's entries $3, $4."""
    per_cell, half, last, magic = (
        f"0f{int(np.float32(value).view(np.uint32)):08X}"
        for value in (slope / _LANE_CELLS, 0.5, _LANE_CELLS, 2**23)
    )
    return f"""{{
        .reg .f32 cell, boundary, rest;
        .reg .b32 index, word, above;
        fma.rn.sat.f32 cell, $2, {per_cell}, {half};
        fma.rn.f32 cell, cell, {last}, {magic};
        mov.b32 index, cell;
        shfl.sync.idx.b32 boundary, $3, index, 0x1f, 0xffffffff;
        sub.rn.f32 rest, boundary, $2;
        mov.b32 word, boundary;
        mov.b32 above, rest;
        shr.u32 above, above, 31;
        add.s32 $0, word, above;
        shfl.sync.idx.b32 $1, $4, $0, 0x1f, 0xffffffff;
    }}"""


@triton.jit
def nearest_in_lanes(u, table, SLOPE: tl.constexpr):
    """Return codes, modulo 2^bits, and centroids. Instructions per element: 6, with two shuffles.

    Lanes without data take part in the shuffles: every lane has some u.
    """
    ASSEMBLY: tl.constexpr = lane_lookup(SLOPE)
    return tl.inline_asm_elementwise(
        ASSEMBLY, "=&r,=&f,f,f,f", [u, table[0], table[1]],
        dtype=(tl.int32, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def nearest(u, table, SLOPE: tl.constexpr, CELLS: tl.constexpr):
    """Return the code of each u (int32) and its centroid. `table` comes from `lookup_table`.

    Bits above those of the code are undefined.

    Instructions per element, in memory: fma, and, 2 loads and their addresses, subtract,
    shift-and-add; address, load.
    """
    if CELLS is None:
        code, centroid = nearest_in_lanes(u, table, SLOPE)
    else:
        cell = tl.fma(u, SLOPE, 12582912.0)
        cell = cell.to(tl.int32, bitcast=True) & (CELLS - 1)
        boundary = tl.load(table + cell)
        below = tl.load(table + cell + CELLS).to(tl.uint32, bitcast=True)
        is_above = (boundary - u).to(tl.uint32, bitcast=True) >> 31  # never -0
        code = (below + is_above).to(tl.int32)
        centroid = tl.load(table + 2 * CELLS + code)
    return code, centroid


@triton.jit
def centroids_in_lanes(centroid_ptr):
    """Return what a lane holds of up to 32 centroids, repeated to 32; see `lookup_table`."""
    lane = tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1
    )
    return tl.load(centroid_ptr + lane)


@triton.jit
def centroids_at(codes, table, IN_LANES: tl.constexpr):
    """Return the centroids of int32 codes; of lanes by their low five bits."""
    if IN_LANES:
        centroids = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $2, $1, 0x1f, 0xffffffff;",
            "=f,r,f", [codes, table], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        centroids = tl.load(table + codes)
    return centroids


@triton.jit
def centroids_of_runs(codes, table, IN_LANES: tl.constexpr):
    """Return the centroids of a tuple of tensors of codes."""
    centroids = ()
    for j in tl.static_range(len(codes)):
        centroids = centroids + (centroids_at(codes[j], table, IN_LANES),)
    return centroids
