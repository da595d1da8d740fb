"""One kernel source for two compilers.

Kernels here are plain functions of Triton operations. Compiled by Triton they run everywhere (and
in its interpreter), and the compiler places elements as it likes. Compiled by Gluon with a layout
of ours, an NVIDIA GPU keeps a vector in the registers of a few lanes of one warp, so a transform
needs neither shared memory nor a barrier.

Both compilers accept the operations of `triton.language` that carry no layout: arithmetic, reshape,
permute, split, join, reductions. What is left over is below; `LAYOUT` is None under Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantforge.ops.launch import INTERPRET


@triton.jit
def per_row(x, LAYOUT: tl.constexpr):
    """Return one number per row as a column that broadcasts against tiles of a layout."""
    if LAYOUT is None:
        result = x[:, None]
    else:
        result = gl.convert_layout(x, gl.SliceLayout(1, LAYOUT))[:, None]
    return result


@triton.jit
def row_axis(ROWS: tl.constexpr, LAYOUT: tl.constexpr):
    """Return 0 .. ROWS - 1 as a column."""
    if LAYOUT is None:
        result = tl.arange(0, ROWS)[:, None]
    else:
        result = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    return result


@triton.jit
def channel_axis(N: tl.constexpr, LAYOUT: tl.constexpr):
    """Return 0 .. N - 1 as a row."""
    if LAYOUT is None:
        result = tl.arange(0, N)[None, :]
    else:
        result = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    return result


@triton.constexpr_function
def first_columns(layout: Any, width: int) -> Any:
    """Return the layout of the first `width` columns of a tile, which must be all in registers."""
    bases = [basis for basis in layout.reg_bases if basis[1] < width]
    shape = [layout.shape[0], width]
    return gl.DistributedLinearLayout(bases, layout.lane_bases, layout.warp_bases, [], shape)


@triton.constexpr_function
def every_second(layout: Any) -> Any:
    """Return the layout (rows, width / 2) of every second column of a tile (rows, width)."""
    kept = [[row, column // 2] for row, column in layout.reg_bases if row or column >= 2]
    lanes = [[row, column // 2] for row, column in layout.lane_bases]
    warps = [[row, column // 2] for row, column in layout.warp_bases]
    shape = [layout.shape[0], layout.shape[1] // 2]
    return gl.DistributedLinearLayout(kept, lanes, warps, [], shape)


@triton.jit
def columns(x, N: tl.constexpr, LAYOUT: tl.constexpr):
    """Return x (ROWS, N) or (ROWS, 1) in the layout of the first N columns of a tile."""
    if LAYOUT is None:
        result = x
    else:
        result = gl.convert_layout(x, first_columns(LAYOUT, N))
    return result


@triton.jit
def column_axis(N: tl.constexpr, LAYOUT: tl.constexpr):
    """Return 0 .. N - 1 as a row, for what `columns` returns."""
    if LAYOUT is None:
        result = tl.arange(0, N)[None, :]
    else:
        result = gl.arange(0, N, layout=gl.SliceLayout(0, first_columns(LAYOUT, N)))[None, :]
    return result


@dataclass(frozen=True)
class Tile:
    """How a tile of rows is spread over the threads of a program.

    Attributes:
        rows: vectors per tile.
        num_warps: warps per program.
        layout: of the tile (rows, width), or None to leave it to the compiler.
        first_lane_bit: the lowest bit of a channel that numbers lanes.
        lane_bits: how many bits do; the others number registers.
    """

    rows: int
    num_warps: int
    layout: gl.DistributedLinearLayout | None = None
    first_lane_bit: int = 0
    lane_bits: int = 0


LANES = 5
"""Bits that number the lanes of a warp."""


@lru_cache(maxsize=256)
def lane_tile(width: int, low_bits: int, high_bits: int, num_warps: int) -> Tile | None:
    """Return a tile whose vectors of `width` (a power of two) lie in `2^lane_bits` lanes each.

        channel    [ high bits: registers ][ middle bits: lanes ][ low bits: registers ]
        row        [ warps ][ remaining lanes ]

    A thread so loads runs of 2^low_bits channels, and what pairs a channel with one half or a
    quarter of the vector away needs no other lane. None where the middle exceeds a warp.
    """
    bits = width.bit_length() - 1
    low = min(low_bits, bits)
    lanes = max(bits - low - high_bits, 0)
    if lanes > LANES:
        return None
    registers = [[0, 1 << b] for b in (*range(low), *range(low + lanes, bits))]
    lane_bases = [[0, 1 << (low + b)] for b in range(lanes)]
    rows = num_warps << (LANES - lanes)
    row_bases = [[1 << b, 0] for b in range(rows.bit_length() - 1)]
    lane_bases += row_bases[: LANES - lanes]
    warps = row_bases[LANES - lanes :]
    layout = gl.DistributedLinearLayout(registers, lane_bases, warps, [], [rows, width])
    return Tile(rows, num_warps, layout, low, lanes)


@dataclass(frozen=True)
class Kernel:
    """A kernel compiled by Triton or, where a tile has a layout, by Gluon."""

    triton: Any
    gluon: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Return a launcher for a grid."""

        def launch(*, LAYOUT: Any, **arguments: Any) -> Any:
            compiled = self.triton if LAYOUT is None else self.gluon
            return compiled[grid](LAYOUT=LAYOUT, **arguments)

        return launch


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Compile a function on demand, by the compiler that its layout asks for."""

    def decorate(function: Callable[..., Any]) -> Kernel:
        by_gluon = None if INTERPRET else gluon.jit(**options)(function)
        return Kernel(triton.jit(**options)(function), by_gluon)

    return decorate
