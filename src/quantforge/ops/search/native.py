"""Search on the CPU: scores of a tile of rows by the native library, the best of them by torch."""

from __future__ import annotations

import torch

from quantforge.ops.native_call import cannot_run
from quantforge.ops.scores import native as scores_native
from quantforge.ops.search.eager import search_by
from quantforge.spec import QuantSpec


def supports(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    spec_key: str,
) -> str | None:
    """Return why the arguments are not for this backend, or None."""
    return cannot_run(QuantSpec.from_key(spec_key), device=packed.device)


def search(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::search` on the CPU."""
    return search_by(
        scores_native.scores, query, packed, scales, shift, equalizer, filter_bitmap, k, spec_key
    )
