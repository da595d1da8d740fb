"""Launching the kernels that quantize rows."""

from __future__ import annotations

from typing import Any

import torch

from quantforge.numerics.encode import encode_constants
from quantforge.numerics.packing import row_bytes
from quantforge.numerics.rotation import qjl_seed
from quantforge.ops import constants
from quantforge.ops.kernels import arguments
from quantforge.ops.kernels.arguments import (
    Statistics,
    are_words,
    grid_of,
    plane_list,
)
from quantforge.ops.kernels.axes import Axes
from quantforge.ops.kernels.codebook import cells_of, lane_cells_of
from quantforge.ops.kernels.quantize_odd_rows import quantize_odd_rows
from quantforge.ops.kernels.quantize_rows import quantize_rows
from quantforge.ops.kernels.rotation import dense_text
from quantforge.ops.kernels.tuning import odd_factor, placement_of
from quantforge.spec import QuantSpec

AXES = ("batch", "head", "row")


def why_not(spec: QuantSpec, x: torch.Tensor) -> str | None:
    """Return why no kernel can quantize x by a spec, or None."""
    if spec.estimator == "prod" and spec.dim & (spec.dim - 1):
        return f"the QJL residual of dim {spec.dim}, no power of two"
    return arguments.why_not(spec, x, x.dtype)


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
    """Quantize x into rows `position ..` of packed and scales.

    `axes` holds the strides of x, packed, scales and then those of the statistics there are.
    """
    batch, heads, n = axes.sizes
    total = batch * heads * n
    if total == 0:
        return
    place = placement_of(spec, x.device, packs=True)
    grid = grid_of(axes, place, x.device)
    table_of = cells_of if place.tile.layout is None else lane_cells_of
    cells, factors = table_of(spec, x.device), encode_constants(spec.dim)
    on_device = isinstance(position, torch.Tensor)
    common: dict[str, Any] = {
        "x_ptr": x,
        "packed_ptr": packed,
        "scales_ptr": scales,
        "position_ptr": position if on_device else None,
        "shift_ptr": statistics.shift,
        "signs_ptr": constants.signs(spec.dim, spec.seed, x.device),
        "table_ptr": cells.table,
        "position": 0 if on_device else position,
        "n": n,
        "heads": heads,
        "total": total,
        "capacity": capacity,
        "x_channel": x.stride(-1),
        "DIM": spec.dim,
        "ROWS": place.tile.rows,
        "TILES": grid.tiles,
        "PER_ROW": grid.per_row,
        "PLANES": plane_list(spec),
        "WORDS": are_words(packed),
        "RULE": spec.scale_rule,
        "SLOPE": cells.slope,
        "CELLS": cells.size,
        "INV_SQRT_DIM": factors.inv_sqrt_dim,
        "FIRST_LANE_BIT": place.tile.first_lane_bit,
        "LANE_BITS": place.tile.lane_bits,
        "LAYOUT": place.tile.layout,
        "num_warps": place.tile.num_warps,
        "enable_fp_fusion": False,  # every operation of the definition is rounded
    }
    for name, strides in zip(("x", "packed", "scales"), axes.strides, strict=False):
        common |= {f"{name}_{axis}": s for axis, s in zip(AXES, strides, strict=True)}
    shift_batch, shift_head, equalizer_batch, equalizer_head = statistics.strides(axes)
    common |= {"shift_batch": shift_batch, "shift_head": shift_head}
    with torch.cuda.device_of(x):  # models may be spread over several GPUs
        if odd_factor(spec.dim) == 1:
            is_prod = spec.estimator == "prod"
            offset = row_bytes(spec.dim, spec.code_bits)
            seed = qjl_seed(spec.seed)
            quantize_rows[(grid.programs,)](
                **common,
                equalizer_ptr=statistics.equalizer,
                equalizer_batch=equalizer_batch,
                equalizer_head=equalizer_head,
                qjl_signs_ptr=constants.signs(spec.dim, seed, x.device) if is_prod else None,
                scales_column=scales.stride(-1),
                QJL_PLANES=((1, 0, offset),) if is_prod else None,
                SQRT_DIM=factors.sqrt_dim,
                QJL_FACTOR=factors.qjl,
            )
            return
        order, equalizer = 4 * odd_factor(spec.dim), statistics.equalizer
        quantize_odd_rows[(grid.programs,)](
            **common,
            inverse_ptr=None if equalizer is None else equalizer.to(torch.float32).reciprocal(),
            inverse_batch=equalizer_batch,
            inverse_head=equalizer_head,
            flips_ptr=constants.flips(spec.dim, spec.seed, x.device),
            M=order,
            DENSE=dense_text(order),
        )
