"""Scores by fused kernels: rows are read once, decoded in registers and never written.

The kernels are in `ops.kernels.products`, their choice and tuning in `ops.kernels.score`.
"""

from __future__ import annotations

import torch

from quantforge.ops.kernels.rows import product_of, reason_against
from quantforge.ops.kernels.score import score
from quantforge.spec import QuantSpec


def supports(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
    precision: str = "exact",
) -> str | None:
    """Return why these arguments are not for the kernels, or None."""
    return reason_against(query, packed, scales, QuantSpec.from_key(spec_key))


def scores(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
    precision: str = "exact",
) -> torch.Tensor:
    """Implement `quantforge::scores`: exact whatever the precision."""
    spec = QuantSpec.from_key(spec_key)
    lead = torch.broadcast_shapes(query.shape[:-2], packed.shape[:-2])
    shape = (*lead, query.shape[-2], packed.shape[-2])
    if 0 in shape:
        return query.new_empty(shape)
    with torch.cuda.device_of(packed):  # models may be spread over several GPUs
        product = product_of(query, packed, scales, shift, equalizer, spec)
        return score(product, query.dtype).view(shape)
