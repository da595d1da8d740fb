"""Launching the kernel that dequantizes rows."""

from __future__ import annotations

import torch

from quantforge.numerics.encode import encode_constants
from quantforge.numerics.packing import row_bytes
from quantforge.numerics.rotation import qjl_seed
from quantforge.ops import constants
from quantforge.ops.kernels import arguments
from quantforge.ops.kernels.arguments import Statistics, grid_of, plane_list
from quantforge.ops.kernels.axes import Axes
from quantforge.ops.kernels.dequantize_rows import dequantize_rows
from quantforge.ops.kernels.tuning import placement
from quantforge.spec import QuantSpec

AXES = ("batch", "head", "row")


def why_not(spec: QuantSpec, packed: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Return why no kernel can dequantize rows of a spec, or None."""
    if spec.dim & (spec.dim - 1):
        return f"dim {spec.dim} is no power of two"
    return arguments.why_not(spec, packed, dtype)


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
    place = placement(spec, packed.device)
    grid = grid_of(axes, place, packed.device)
    is_prod = spec.estimator == "prod"
    strides = {
        f"{name}_{axis}": stride
        for name, of_tensor in zip(("out", "packed", "scales"), axes.strides, strict=False)
        for axis, stride in zip(AXES, of_tensor, strict=True)
    }
    shift_batch, shift_head, equalizer_batch, equalizer_head = statistics.strides(axes)
    qjl_signs = constants.signs(spec.dim, qjl_seed(spec.seed), packed.device) if is_prod else None
    dequantize_rows[(grid.programs,)](
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
        QJL_PLANES=((1, 0, row_bytes(spec.dim, spec.code_bits)),) if is_prod else None,
        INV_SQRT_DIM=encode_constants(spec.dim).inv_sqrt_dim,
        FIRST_LANE_BIT=place.tile.first_lane_bit,
        LANE_BITS=place.tile.lane_bits,
        LAYOUT=place.tile.layout,
        num_warps=place.tile.num_warps,
    )
