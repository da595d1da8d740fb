"""What the launchers of `quantize` and `dequantize` share: support, statistics, grid, planes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quantforge.numerics.codebook import is_symmetric
from quantforge.numerics.packing import planes
from quantforge.ops.kernels.axes import Axes
from quantforge.ops.kernels.tuning import Placement, odd_factor
from quantforge.ops.launch import cannot_run_on, multiprocessors
from quantforge.spec import QuantSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MIN_POWER, MAX_DIM = 8, 8192
"""Least power of two in a dim: the fields of a byte must be whole columns of a tile."""
MAX_ROWS = 2**31 - 2**16


def why_not(spec: QuantSpec, rows: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Return why kernels cannot run a spec on rows (..., .), vectors being of a dtype, or None."""
    reason = cannot_run_on(rows.device)
    if reason is not None:
        return reason
    if spec.rotation != "hadamard":
        return f"kernels have Hadamard rotations only, not {spec.rotation}"
    if not is_symmetric(spec):
        return "the codebook is not symmetric"
    power = spec.dim // odd_factor(spec.dim)
    if power < MIN_POWER or spec.dim > MAX_DIM:
        return f"dim {spec.dim} exceeds {MAX_DIM} or has a power of two below {MIN_POWER}"
    if dtype not in DTYPES:
        return f"vectors are {dtype}"
    if math.prod(rows.shape[:-1]) > MAX_ROWS:
        return "there are more than 2^31 vectors"
    return None


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

    def strides(self, axes: Axes) -> tuple[int, int, int, int]:
        """Return batch and head strides of both, 0 for what is not there.

        `axes` ends in those that are.
        """
        rest = list(axes.strides[len(axes.strides) - len(self.given) :])
        shift = rest.pop(0) if self.shift is not None else (0, 0, 0)
        equalizer = rest.pop(0) if self.equalizer is not None else (0, 0, 0)
        return (*shift[:2], *equalizer[:2])


def are_words(packed: torch.Tensor) -> bool:
    """Return whether rows start at multiples of 4 bytes, but not of 16, and have no gaps."""
    *strides, last = packed.stride()
    starts = [packed.data_ptr(), *strides]
    in_words = last == 1 and all(start % 4 == 0 for start in starts)
    return in_words and any(start % 16 for start in starts)


def statistics_of(shift: torch.Tensor | None, equalizer: torch.Tensor | None) -> Statistics:
    """Return the statistics of a call."""
    return Statistics(_dense_channels(shift), _dense_channels(equalizer))


def _dense_channels(t: torch.Tensor | None) -> torch.Tensor | None:
    return t.contiguous() if t is not None and t.stride(-1) != 1 else t


def plane_list(spec: QuantSpec) -> tuple[tuple[int, int, int], ...]:
    """Return (width, shift, offset) of the planes of codes."""
    return tuple((p.width, p.shift, p.offset) for p in planes(spec.dim, spec.code_bits))


@dataclass(frozen=True)
class Grid:
    """How many programs run, of how many tiles each, and whether they cross heads."""

    programs: int
    tiles: int
    per_row: bool


def grid_of(axes: Axes, place: Placement, device: torch.device) -> Grid:
    """Return the grid for rows of merged axes."""
    batch, heads, n = axes.sizes
    rows = place.tile.rows
    if n < 4 * rows:
        return Grid(-(-batch * heads * n // rows), 1, True)
    enough = batch * heads * (n // rows) >= 8 * multiprocessors(device) * place.tiles
    tiles = place.tiles if enough else 1
    return Grid(batch * heads * -(-n // (rows * tiles)), tiles, False)
