"""Public `search`: validation, then the operator."""

from __future__ import annotations

import torch

from quantforge.errors import InputError
from quantforge.ops._library import Impl, run
from quantforge.ops.checks import (
    check_floating,
    check_last_dim,
    check_packed,
    check_statistic,
)
from quantforge.ops.search import op
from quantforge.ops.search.eager import MAX_ROWS
from quantforge.spec import QuantSpec


def search(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    spec: QuantSpec,
    k: int,
    *,
    shift: torch.Tensor | None = None,
    equalizer: torch.Tensor | None = None,
    filter_bitmap: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k packed vectors with the greatest inner product for each query.

        scores, rows = topk(query @ X^T, k)

    Equal scores are ordered by rising row, on every backend. Rows that the filter hides, or whose
    score is NaN or -inf, are not found; a query with fewer than k others has score -inf and row
    -1 in the places that are left.

    Args:
        query: (q, dim) float tensor.
        packed: (n, row_bytes) uint8, n at most 2^32.
        scales: (n, 1) or (n, 2).
        spec: the code.
        k: results per query, at least 1.
        shift: (dim,) or (1, dim), as given to `quantize`.
        equalizer: likewise.
        filter_bitmap: (ceil(n / 8),) uint8, or int32 of at least as many bytes: bit `i % 8` of
            byte `i // 8` is set where row i may be found
            (`numpy.packbits(allowed, bitorder="little")`).
        impl: "auto" takes the fastest backend that supports the call; a named one never falls back.

    Returns:
        Scores (q, k) in float32, falling, and rows (q, k) in int64. Scores are accurate to float32
        rounding. On a GPU rows are preselected with a margin, by scores off by 2e-4 of their
        deviation, for up to 8 queries by 3e-3 at 4 bits and 1e-3 at 3: far less than the codes
        are off themselves, but a row so near to the k-th best may stand in for it.

    Raises:
        InputError: for shapes that do not fit.
        ConfigError: for an unknown impl.
        UnsupportedError: if the backend asked for cannot run this call.

    Source: arXiv 2504.19874, section 3.2.
    Cost: reads `bits / 8` bytes per number, once per 128 queries; the (q, n) scores are never
    written.
    """
    check_floating("query", query)
    check_last_dim("query", query, spec.dim)
    check_packed("packed", packed, scales, spec)
    if query.ndim != 2 or packed.ndim != 2:
        raise InputError(
            "search takes query (q, dim) and packed (n, row_bytes); got shapes "
            f"{tuple(query.shape)} and {tuple(packed.shape)}"
        )
    if type(k) is not int or k < 1:
        raise InputError(f"k must be an integer of at least 1; got {k!r}")
    n = packed.shape[0]
    if n > MAX_ROWS:
        raise InputError(f"search numbers rows in 32 bits; got {n} rows; search them in parts")
    shape = torch.Size((n, spec.dim))
    check_statistic("shift", shift, shape)
    check_statistic("equalizer", equalizer, shape)
    bitmap = None if filter_bitmap is None else _bytes_of(filter_bitmap, n, packed.device)
    arguments = (query, packed, scales, shift, equalizer, bitmap, k, spec.key)
    return op.search(*arguments) if impl == "auto" else run("search", impl, *arguments)


def _bytes_of(bitmap: torch.Tensor, n: int, device: torch.device) -> torch.Tensor:
    """Return a bitmap as contiguous bytes."""
    good = bitmap.ndim == 1 and bitmap.dtype in (torch.uint8, torch.int32)
    if not good or bitmap.numel() * bitmap.element_size() < -(-n // 8):
        raise InputError(
            f"filter_bitmap must hold {-(-n // 8)} bytes for {n} rows, as 1-d uint8 or int32; got "
            f"{bitmap.dtype} of shape {tuple(bitmap.shape)}"
        )
    if bitmap.device != device:
        raise InputError(f"filter_bitmap is on {bitmap.device}, the codes are on {device}")
    return bitmap.contiguous().view(torch.uint8)
