"""Launching the kernels that dequantize rows."""

from __future__ import annotations

from typing import Any

import torch

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.encode import encode_constants
from quantforge.numerics.packing import row_bytes
from quantforge.numerics.rotation import qjl_seed
from quantforge.ops import constants
from quantforge.ops.kernels.arguments import (
    Statistics,
    are_words,
    grid_of,
    plane_list,
)
from quantforge.ops.kernels.axes import Axes, merge, row_strides
from quantforge.ops.kernels.codebook import MAX_LANE_BITS, centroids_of_lanes
from quantforge.ops.kernels.dequantize_rows import dequantize_rows
from quantforge.ops.kernels.dequantize_words import dequantize_words
from quantforge.ops.kernels.rotation import dense_text
from quantforge.ops.kernels.tuning import Placement, odd_factor, placement_of
from quantforge.spec import QuantSpec

AXES = ("batch", "head", "row")
MAX_HALF = 60000.0
"""Sums of centroids up to here are fp16 numbers."""


def fits_words(out: torch.Tensor, spec: QuantSpec, place: Placement, axes: Axes) -> bool:
    """Return whether out can be computed in words of two fp16 numbers."""
    peak = float(abs(codebook_of(spec).centroids).max())
    return (
        out.dtype in (torch.float16, torch.bfloat16)
        and spec.estimator == "mse"
        and place.tile.layout is not None
        and peak * spec.dim < MAX_HALF
        and all(stride % 2 == 0 for stride in (*axes.strides[0], out.storage_offset()))
    )


def decode_rotated(
    out: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, spec: QuantSpec
) -> None:
    """Write R x, `scale * centroid` in channel order, to out (..., n, dim) of any float dtype.

    For products with rotated vectors: no transform, one lookup per number. out has contiguous
    channels, and leading axes like packed (..., n, bytes) that merge into three.
    """
    lead = out.shape[:-1]
    axes = merge([row_strides(t, lead) for t in (out, packed, scales)], lead)
    assert axes is not None, "leading axes must merge into three"
    launch(out, packed, scales, Statistics(None, None), spec, axes, rotated=True)


def launch(
    out: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    statistics: Statistics,
    spec: QuantSpec,
    axes: Axes,
    *,
    rotated: bool = False,
) -> None:
    """Dequantize into out; `axes` holds the strides of out, packed, scales and the statistics.

    With `rotated` out becomes `scale * centroid`, which is R x: for products with rotated vectors.
    """
    batch, heads, n = axes.sizes
    total = batch * heads * n
    if total == 0:
        return
    assert not (rotated and statistics.given), "statistics belong to the basis of x"
    place = placement_of(spec, packed.device, packs=False)
    grid = grid_of(axes, place, packed.device)
    in_lanes = place.tile.layout is not None and spec.code_bits <= MAX_LANE_BITS
    table_of = centroids_of_lanes if in_lanes else constants.centroids
    words = fits_words(out, spec, place, axes)
    order = 1 if odd_factor(spec.dim) == 1 else 4 * odd_factor(spec.dim)
    strides = {
        f"{name}_{axis}": stride // (2 if words and name == "out" else 1)
        for name, of_tensor in zip(("out", "packed", "scales"), axes.strides, strict=False)
        for axis, stride in zip(AXES, of_tensor, strict=True)
    }
    shift_batch, shift_head, equalizer_batch, equalizer_head = statistics.strides(axes)
    common: dict[str, Any] = dict(
        packed_ptr=packed,
        scales_ptr=scales,
        shift_ptr=statistics.shift,
        equalizer_ptr=statistics.equalizer,
        centroid_ptr=table_of(spec, packed.device),
        n=n,
        heads=heads,
        total=total,
        **strides,
        packed_byte=packed.stride(-1),
        shift_batch=shift_batch,
        shift_head=shift_head,
        equalizer_batch=equalizer_batch,
        equalizer_head=equalizer_head,
        DIM=spec.dim,
        M=order,
        DENSE=dense_text(order, transpose=True),
        ROTATED=rotated,
        ROWS=place.tile.rows,
        TILES=grid.tiles,
        PER_ROW=grid.per_row,
        PLANES=plane_list(spec),
        IN_LANES=in_lanes,
        WORDS=are_words(packed),
        INV_SQRT_DIM=encode_constants(spec.dim).inv_sqrt_dim,
        FIRST_LANE_BIT=place.tile.first_lane_bit,
        LANE_BITS=place.tile.lane_bits,
        LAYOUT=place.tile.layout,
        num_warps=place.tile.num_warps,
    )
    with torch.cuda.device_of(packed):  # models may be spread over several GPUs
        if words:
            dequantize_words[(grid.programs,)](
                **common,
                out_ptr=out.view(torch.int32),
                flips_ptr=constants.flips(spec.dim, spec.seed, packed.device).view(torch.int32),
                BFLOAT16=out.dtype == torch.bfloat16,
            )
            return
        is_prod = spec.estimator == "prod"
        seed, device = qjl_seed(spec.seed), packed.device
        dequantize_rows[(grid.programs,)](
            **common,
            out_ptr=out,
            signs_ptr=constants.signs(spec.dim, spec.seed, device),
            qjl_signs_ptr=constants.signs(spec.dim, seed, device) if is_prod else None,
            scales_column=scales.stride(-1),
            QJL_PLANES=((1, 0, row_bytes(spec.dim, spec.code_bits)),) if is_prod else None,
        )
