"""Launching `quantize_rows`: what it supports, with which tile, and with which arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quantforge.numerics.encode import encode_constants
from quantforge.numerics.packing import planes, row_bytes
from quantforge.numerics.rotation import qjl_seed
from quantforge.ops import constants
from quantforge.ops.kernels.axes import Axes
from quantforge.ops.kernels.codebook import cells_of
from quantforge.ops.kernels.layouts import Tile, lane_tile
from quantforge.ops.kernels.quantize_rows import quantize_rows
from quantforge.ops.launch import cannot_run_on, capability, multiprocessors
from quantforge.spec import QuantSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MIN_DIM, MAX_DIM = 8, 8192
MAX_ROWS = 2**31 - 2**16
PROGRAM_ELEMENTS = 4096
"""Numbers per program where the compiler places them."""


@dataclass(frozen=True)
class Tuning:
    """How vectors up to a dim are spread over lanes.

    Attributes:
        dim: greatest dim.
        low_bits: bits of a channel, the lowest, that number registers: the width of a load.
        high_bits: as many of the highest ones.
        num_warps: warps per program.
        tiles: tiles per program where there are enough to fill the GPU.
    """

    dim: int
    low_bits: int
    high_bits: int
    num_warps: int
    tiles: int


# untuned: chosen by the instruction count for sm_90, Triton 3.6
TUNING = (
    Tuning(dim=1024, low_bits=3, high_bits=2, num_warps=4, tiles=4),
    Tuning(dim=2048, low_bits=3, high_bits=3, num_warps=4, tiles=2),
)


def why_not(spec: QuantSpec, x: torch.Tensor) -> str | None:
    """Return why the kernel cannot quantize x by a spec, or None."""
    reason = cannot_run_on(x.device)
    if reason is not None:
        return reason
    if spec.rotation == "qr":
        return "the QR rotation is a matmul"
    if spec.dim & (spec.dim - 1) or not MIN_DIM <= spec.dim <= MAX_DIM:
        return f"dim {spec.dim} is no power of two from {MIN_DIM} to {MAX_DIM}"
    if x.dtype not in DTYPES:
        return f"the input is {x.dtype}"
    if math.prod(x.shape[:-1]) > MAX_ROWS:
        return "there are more than 2^31 vectors"
    return None


def plane_list(spec: QuantSpec) -> tuple[tuple[int, int, int], ...]:
    """Return (width, shift, offset) of the planes of codes."""
    return tuple((p.width, p.shift, p.offset) for p in planes(spec.dim, spec.code_bits))


def tile_of(spec: QuantSpec, device: torch.device) -> tuple[Tile, int]:
    """Return the tile for a spec, and how many of them make a program."""
    narrow = spec.estimator == "prod" or any(width == 1 for width, _, _ in plane_list(spec))
    if capability(device)[0] >= 7:
        for row in TUNING:
            if spec.dim <= row.dim:
                # fields of one byte lie an eighth of the vector apart, which three bits reach
                low, high = (2, row.high_bits + 1) if narrow else (row.low_bits, row.high_bits)
                tile = lane_tile(spec.dim, low, high, row.num_warps)
                if tile is not None:
                    return tile, row.tiles
    return Tile(max(1, PROGRAM_ELEMENTS // spec.dim), num_warps=4), 1


@dataclass(frozen=True)
class Statistics:
    """Shift and equalizer of a call with contiguous channels, where given."""

    shift: torch.Tensor | None
    equalizer: torch.Tensor | None

    @property
    def given(self) -> list[torch.Tensor]:
        """Those there are."""
        return [t for t in (self.shift, self.equalizer) if t is not None]

    @property
    def differ(self) -> bool:
        """Whether they differ between heads, so that rows must stay apart."""
        return any(t.numel() > t.shape[-1] for t in self.given)


def statistics_of(shift: torch.Tensor | None, equalizer: torch.Tensor | None) -> Statistics:
    """Return the statistics of a call."""
    return Statistics(_dense_channels(shift), _dense_channels(equalizer))


def _dense_channels(t: torch.Tensor | None) -> torch.Tensor | None:
    return t.contiguous() if t is not None and t.stride(-1) != 1 else t


def launch(
    packed: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor | int,
    statistics: Statistics,
    spec: QuantSpec,
    axes: Axes,
    capacity: int,
) -> None:
    """Quantize x into rows `position ..` of packed and scales, whose axes are merged in `axes`.

    `axes` holds the strides of x, packed, scales and then those of the statistics there are.
    """
    batch, heads, n = axes.sizes
    total = batch * heads * n
    if total == 0:
        return
    tile, tiles = tile_of(spec, x.device)
    many = 8 * multiprocessors(x.device) * tiles
    per_row = n < 4 * tile.rows
    if per_row or batch * heads * (n // tile.rows) < many:
        tiles = 1
    programs = -(-total // tile.rows) if per_row else batch * heads * -(-n // (tile.rows * tiles))
    strides = list(axes.strides)
    (x_strides, packed_strides, scale_strides), rest = strides[:3], strides[3:]
    shift, equalizer = statistics.shift, statistics.equalizer
    shift_strides = rest.pop(0) if shift is not None else (0, 0, 0)
    equalizer_strides = rest.pop(0) if equalizer is not None else (0, 0, 0)
    cells, factors = cells_of(spec, x.device), encode_constants(spec.dim)
    is_prod = spec.estimator == "prod"
    offset = row_bytes(spec.dim, spec.code_bits)
    quantize_rows[(programs,)](
        x,
        packed,
        scales,
        position if isinstance(position, torch.Tensor) else None,
        shift,
        equalizer,
        constants.signs(spec.dim, spec.seed, x.device),
        constants.signs(spec.dim, qjl_seed(spec.seed), x.device) if is_prod else None,
        cells.table,
        0 if isinstance(position, torch.Tensor) else position,
        n,
        heads,
        total,
        capacity,
        *x_strides,
        x.stride(-1),
        *packed_strides,
        *scale_strides,
        scales.stride(-1),
        *shift_strides[:2],
        *equalizer_strides[:2],
        DIM=spec.dim,
        ROWS=tile.rows,
        TILES=tiles,
        PER_ROW=per_row,
        PLANES=plane_list(spec),
        QJL_PLANES=((1, 0, offset),) if is_prod else None,
        RULE=spec.scale_rule,
        SLOPE=cells.slope,
        CELLS=cells.size,
        SQRT_DIM=factors.sqrt_dim,
        INV_SQRT_DIM=factors.inv_sqrt_dim,
        QJL_FACTOR=factors.qjl,
        FIRST_LANE_BIT=tile.first_lane_bit,
        LANE_BITS=tile.lane_bits,
        LAYOUT=tile.layout,
        num_warps=tile.num_warps,
        enable_fp_fusion=False,
    )
