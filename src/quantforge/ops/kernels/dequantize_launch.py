"""Launching the kernels that dequantize rows."""

from __future__ import annotations

from typing import Any

import torch

from quantforge.numerics.encode import encode_constants
from quantforge.numerics.hadamard import base_matrix
from quantforge.numerics.packing import row_bytes
from quantforge.numerics.rotation import qjl_seed
from quantforge.ops import constants
from quantforge.ops.kernels.arguments import (
    Statistics,
    are_words,
    grid_of,
    plane_list,
    signs_of_rows,
)
from quantforge.ops.kernels.axes import Axes
from quantforge.ops.kernels.dequantize_odd_rows import dequantize_odd_rows
from quantforge.ops.kernels.dequantize_rows import dequantize_rows
from quantforge.ops.kernels.tuning import odd_factor, placement_of
from quantforge.spec import QuantSpec

AXES = ("batch", "head", "row")


def launch(
    out: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    statistics: Statistics,
    spec: QuantSpec,
    axes: Axes,
) -> None:
    """Dequantize into out; `axes` holds the strides of out, packed, scales and the statistics."""
    batch, heads, n = axes.sizes
    total = batch * heads * n
    if total == 0:
        return
    place = placement_of(spec, packed.device, packs=False)
    grid = grid_of(axes, place, packed.device)
    is_prod = spec.estimator == "prod"
    strides = {
        f"{name}_{axis}": stride
        for name, of_tensor in zip(("out", "packed", "scales"), axes.strides, strict=False)
        for axis, stride in zip(AXES, of_tensor, strict=True)
    }
    shift_batch, shift_head, equalizer_batch, equalizer_head = statistics.strides(axes)
    qjl_signs = constants.signs(spec.dim, qjl_seed(spec.seed), packed.device) if is_prod else None
    common: dict[str, Any] = dict(
        out_ptr=out,
        packed_ptr=packed,
        scales_ptr=scales,
        shift_ptr=statistics.shift,
        equalizer_ptr=statistics.equalizer,
        signs_ptr=constants.signs(spec.dim, spec.seed, packed.device),
        qjl_signs_ptr=qjl_signs,
        centroid_ptr=constants.centroids(spec, packed.device),
        n=n,
        heads=heads,
        total=total,
        **strides,
        packed_byte=packed.stride(-1),
        scales_column=scales.stride(-1),
        shift_batch=shift_batch,
        shift_head=shift_head,
        equalizer_batch=equalizer_batch,
        equalizer_head=equalizer_head,
        DIM=spec.dim,
        ROWS=place.tile.rows,
        TILES=grid.tiles,
        PER_ROW=grid.per_row,
        PLANES=plane_list(spec),
        WORDS=are_words(packed),
        QJL_PLANES=((1, 0, row_bytes(spec.dim, spec.code_bits)),) if is_prod else None,
        INV_SQRT_DIM=encode_constants(spec.dim).inv_sqrt_dim,
        num_warps=place.tile.num_warps,
    )
    with torch.cuda.device_of(packed):  # models may be spread over several GPUs
        if place.runs is None:
            dequantize_rows[(grid.programs,)](
                **common,
                FIRST_LANE_BIT=place.tile.first_lane_bit,
                LANE_BITS=place.tile.lane_bits,
                LAYOUT=place.tile.layout,
            )
            return
        order = 4 * odd_factor(spec.dim)
        dequantize_odd_rows[(grid.programs,)](
            **common,
            M=order,
            SIGNS=signs_of_rows(base_matrix(order).T),
            FIRST_LANE_BIT=place.runs.first_lane_bit - 2,
            LANE_BITS=place.runs.lane_bits,
            LAYOUT=place.runs.layout,
        )
