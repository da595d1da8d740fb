"""The operands of a product with axes merged: what a launch needs to know about its rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

import torch

from quantforge.numerics.codebook import is_symmetric
from quantforge.numerics.packing import planes
from quantforge.ops.kernels.query import MAX_FACTORED_DIM
from quantforge.ops.launch import INTERPRET, cannot_run_on
from quantforge.spec import QuantSpec

MAX_HEADS = (1 << 16) - 1
"""Programs on the second and third axis of a launch."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows of up to two leading axes, as a kernel addresses them.

    Attributes:
        packed: (..., n, bytes).
        scales: (..., n, 1).
        heads: sizes of two leading axes.
        strides: of packed: axis 0, axis 1, rows, in elements; likewise of scales.
        alignment: divides every address of a plane, at most 16.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    heads: tuple[int, int]
    strides: tuple[tuple[int, int, int], tuple[int, int, int]]
    alignment: int


def reason_against(
    dense: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, spec: QuantSpec
) -> str | None:
    """Return why kernels cannot multiply queries or weights with packed rows, or None."""
    if (reason := cannot_run_on(dense.device)) is not None:
        return reason
    if packed.device != dense.device:
        return f"the dense operand is on {dense.device}, the codes on {packed.device}"
    if spec.estimator == "prod":
        return "the QJL residual is a second product in another basis"
    if not is_symmetric(spec):
        return "the codebook is not symmetric"
    if spec.dim > MAX_FACTORED_DIM:
        return f"dim {spec.dim} is more than {MAX_FACTORED_DIM}"
    if INTERPRET and dense.dtype == torch.bfloat16:
        return "the interpreter gets bfloat16 wrong"
    if packed.stride(-1) != 1 and packed.numel():
        return "the bytes of a row are not adjacent"
    if prod(packed.shape[:-2]) != 1:
        lead = torch.broadcast_shapes(dense.shape[:-2], packed.shape[:-2])
        if prod(lead) > MAX_HEADS:
            return f"{prod(lead)} stacked matrices are more than {MAX_HEADS}"
        if rows_of(packed, scales, lead, spec) is None:
            return "more than two leading axes that do not merge into one"
    return None


def rows_of(
    packed: torch.Tensor, scales: torch.Tensor, lead: torch.Size, spec: QuantSpec
) -> Rows | None:
    """Return the addresses of rows broadcast to leading axes, None if those are too many."""
    strides = [t.expand(*lead, *t.shape[-2:]).stride()[: len(lead)] for t in (packed, scales)]
    axes: list[list[int]] = []  # [size, stride of packed, stride of scales], outermost first
    for size, *step in zip(lead, *strides, strict=True):
        if size == 1:
            continue
        if axes and all(axes[-1][i + 1] == step[i] * size for i in range(2)):
            axes[-1] = [axes[-1][0] * size, *step]
        else:
            axes.append([size, *step])
    if len(axes) > 2:
        return None
    axes = [[1, 0, 0]] * (2 - len(axes)) + axes
    first, second = ((axes[0][i], axes[1][i], t.stride(-2)) for i, t in ((1, packed), (2, scales)))
    alignment = gcd(16, packed.data_ptr() if packed.numel() else 16, *first)
    for plane in planes(spec.dim, spec.code_bits):
        alignment = gcd(alignment, plane.offset)
    return Rows(packed, scales, (axes[0][0], axes[1][0]), (first, second), alignment)


@dataclass(frozen=True, eq=False)
class Product:
    """Queries and rows of one call, with axes merged.

    Attributes:
        query: (heads, q, dim) contiguous; weights (heads, q, n) in its place for sums of rows.
        rows: the rows.
        shift: (dim,) or (heads, dim), or None.
        equalizer: likewise.
        spec: the code.
    """

    query: torch.Tensor
    rows: Rows
    shift: torch.Tensor | None
    equalizer: torch.Tensor | None
    spec: QuantSpec

    @property
    def n(self) -> int:
        """Rows per head."""
        return self.rows.packed.shape[-2]


def product_of(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec: QuantSpec,
) -> Product:
    """Merge the axes of a call: queries of all heads are queries of one where rows are shared."""
    dim, width = spec.dim, query.shape[-1]
    if prod(packed.shape[:-2]) == 1:
        lead = torch.Size()
        packed, scales = (t.reshape(t.shape[-2:]) for t in (packed, scales))
        heads, query = 1, query.reshape(1, -1, width)
    else:
        lead = torch.broadcast_shapes(query.shape[:-2], packed.shape[:-2])
        heads = prod(lead)
        query = query.expand(*lead, *query.shape[-2:]).reshape(heads, -1, width)
    statistics = []
    for t in (shift, equalizer):
        if t is not None and t.numel() != dim:
            t = t.expand(*lead, 1, dim).reshape(heads, dim)
        statistics.append(None if t is None else t.reshape(-1, dim).contiguous())
    rows = rows_of(packed, scales, lead, spec)
    assert rows is not None, "supports() has looked at the axes"
    return Product(query.contiguous(), rows, statistics[0], statistics[1], spec)
