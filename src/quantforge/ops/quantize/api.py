"""Public `quantize`: validation, then the operator."""

from __future__ import annotations

import torch

from quantforge.errors import InputError
from quantforge.ops._library import Impl, run
from quantforge.ops.checks import check_floating, check_last_dim, check_statistic, has_values
from quantforge.ops.quantize import op
from quantforge.spec import QuantSpec


def quantize(
    x: torch.Tensor,
    spec: QuantSpec,
    *,
    shift: torch.Tensor | None = None,
    equalizer: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode vectors: `x ~= shift + equalizer * R^T (scale * centroids[codes])`.

    Args:
        x: (..., dim) float tensor; float64 is rounded to float32 first.
        spec: the code.
        shift: subtracted first; (dim,), or (..., 1, dim) broadcasting against x.
        equalizer: divided by next; positive, shaped like shift.
        impl: "auto" takes the fastest backend that supports the call; a named one never falls back.

    Returns:
        packed (..., row_bytes) uint8 and scales (..., 1) in the spec's scale dtype ((..., 2) with
        the QJL residual). Codes are bit-identical on every backend with the Hadamard rotation.

    Raises:
        InputError: for a wrong shape or dtype, NaN or infinity (with the index of the first bad
            vector), or a vector too large for the scale dtype. Checking waits for the device.
        UnsupportedError: if a named backend cannot run the call.

    Source: arXiv 2504.19874, Algorithms 1 and 2.
    Cost: reads x once, writes `bits / 8` bytes per number.
    """
    check_floating("x", x)
    check_last_dim("x", x, spec.dim)
    check_statistic("shift", shift, x.shape)
    check_statistic("equalizer", equalizer, x.shape)
    if impl == "auto":
        packed, scales = op.quantize(x, shift, equalizer, spec.key)
    else:
        packed, scales = run("quantize", impl, x, shift, equalizer, spec.key)
    if has_values(scales):
        check_scales(x, scales, spec)
    return packed, scales


def check_scales(x: torch.Tensor, scales: torch.Tensor, spec: QuantSpec) -> None:
    """Raise `InputError` naming the first vector that has no finite scale."""
    finite = torch.isfinite(scales).all(-1)
    if bool(finite.all()):
        return
    position = int((~finite).flatten().nonzero()[0])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), finite.shape))
    vector = x[index]
    where = "the vector" if not index else f"vector {index[0] if len(index) == 1 else index}"
    if not bool(torch.isfinite(vector).all()):
        raise InputError(
            f"x must be finite, but {where} holds NaN or infinity; remove or replace it "
            "(torch.nan_to_num) before quantizing"
        )
    raise InputError(
        f"{where} has norm {float(vector.double().norm()):.3g}, too large for a "
        f'{spec.scale_dtype} scale; use scale_dtype="float32" or rescale the data'
    )
