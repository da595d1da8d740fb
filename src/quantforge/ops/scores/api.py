"""Public `scores`: validation, then the operator."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from quantforge.ops._library import Impl, run
from quantforge.ops.checks import (
    check_batch,
    check_floating,
    check_last_dim,
    check_packed,
    check_statistic,
)
from quantforge.ops.scores import op
from quantforge.spec import QuantSpec, check_choice

Precision = Literal["exact", "fast"]
"""How exactly to compute scores where a backend has the choice."""


def scores(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    spec: QuantSpec,
    *,
    shift: torch.Tensor | None = None,
    equalizer: torch.Tensor | None = None,
    precision: Precision = "exact",
    impl: Impl = "auto",
) -> torch.Tensor:
    """Score queries against packed vectors: `query @ X^T`, X never decoded in full.

    Args:
        query: (..., q, dim) float tensor.
        packed: (..., n, row_bytes) uint8; leading axes broadcast against the query's.
        scales: (..., n, 1) or (..., n, 2).
        spec: the code.
        shift: as given to `quantize`.
        equalizer: as given to `quantize`.
        precision: "fast" allows an error below 1e-2 of the scores' norm. The native CPU backend
            then multiplies integers (codes of 1-4 bits); other backends are exact either way.
        impl: "auto" takes the fastest backend that supports the call; a named one never falls back.

    Returns:
        (..., q, n) in the query's dtype, accumulated in float32.

    Raises:
        InputError: for shapes that do not fit.
        ConfigError: for an unknown precision or impl.
        UnsupportedError: if a named backend cannot run the call.

    Source: arXiv 2504.19874, section 3.2.
    Cost: reads `bits / 8` bytes per number, once for all queries.
    """
    check_floating("query", query)
    check_last_dim("query", query, spec.dim)
    check_packed("packed", packed, scales, spec)
    check_batch("query", query, "packed", packed)
    shape = torch.Size((*packed.shape[:-1], spec.dim))
    check_statistic("shift", shift, shape)
    check_statistic("equalizer", equalizer, shape)
    check_choice("precision", precision, get_args(Precision))
    arguments = (query, packed, scales, shift, equalizer, spec.key)
    choice = () if precision == "exact" else (precision,)
    if impl == "auto":
        return op.scores(*arguments, *choice)
    return run("scores", impl, *arguments, *choice)
