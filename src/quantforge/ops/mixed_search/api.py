"""Public `mixed_search`: validation, then the operator."""

from __future__ import annotations

import torch

from quantforge.errors import InputError
from quantforge.ops._library import Impl, run
from quantforge.ops.checks import check_packed
from quantforge.ops.mixed_search import op
from quantforge.ops.mixed_search.parts import Bounds, Visits
from quantforge.spec import QuantSpec

MAX_ROWS = 1 << 32


def mixed_search(
    query: torch.Tensor,
    packed: tuple[torch.Tensor, ...],
    specs: tuple[QuantSpec, ...],
    scales: torch.Tensor,
    offsets: torch.Tensor,
    base: torch.Tensor,
    k: int,
    *,
    unit: float = 1.0,
    visits: Visits | None = None,
    bounds: Bounds | None = None,
    filter_bitmap: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k rows with the greatest scores for each query, in codes of several groups.

        score = scale * sum over groups of <query part, centroids[codes]> + unit * offset + base

    Products are of integers (`numerics.integers`) with an error below 1e-2 of the scores' norm, so
    scores and rows are the same on every backend, for any batch and any number of threads. Equal
    scores are ordered by rising row; rows whose score is NaN or -inf are not found.

    Args:
        query: (q, dim) float32, in the order of directions of the groups; not rotated here.
        packed: per group (n, row_bytes) uint8, n at most 2^32.
        specs: per group, with dims that add up to dim.
        scales: (n, 1) float16.
        offsets: (n,) float16.
        base: float32, added to all scores of a query: (q,), or one for each visit.
        k: results per query, at least 1.
        unit: of offsets.
        visits: which rows each query looks at; None for all.
        bounds: lets the native backend skip rows; changes no result.
        filter_bitmap: (ceil(n / 8),) uint8: bit `i % 8` of byte `i // 8` is set where row i may be
            found.
        impl: "auto" takes the fastest backend that supports the call; a named one never falls back.

    Returns:
        Scores (q, k) float32, falling, and rows (q, k) int64; -inf and -1 where there is no row.

    Raises:
        InputError: for shapes or dtypes that do not fit.
        ConfigError: for an unknown impl.
        UnsupportedError: if the backend asked for cannot run this call.

    Cost: reads every code once per batch; with bounds only those of the leading groups for most
    rows. The scores are never written.
    """
    if not packed or len(packed) != len(specs):
        raise InputError(f"each of {len(specs)} specs needs codes; got {len(packed)}")
    n, dim = packed[0].shape[0], sum(spec.dim for spec in specs)
    for rows, spec in zip(packed, specs, strict=True):
        check_packed("packed", rows, scales, spec)
        if rows.ndim != 2 or rows.shape[0] != n:
            raise InputError(f"packed must be ({n}, row_bytes); got {tuple(rows.shape)}")
    if query.ndim != 2 or query.shape[1] != dim or query.dtype != torch.float32:
        raise InputError(
            f"query must be float32 (q, {dim}); got {query.dtype} of shape {tuple(query.shape)}"
        )
    count = len(query) if visits is None else len(visits.queries)
    _check("scales", scales, (n, 1), torch.float16)
    _check("offsets", offsets, (n,), torch.float16)
    _check("base", base, (count,), torch.float32)
    if filter_bitmap is not None:
        _check("filter_bitmap", filter_bitmap, (-(-n // 8),), torch.uint8)
    if bounds is not None:
        _check("bounds.rests", bounds.rests, (n,), torch.float16)
        _check("bounds.steps", bounds.steps, (dim,), torch.float32)
        if not 1 <= bounds.lead <= len(specs):
            raise InputError(f"bounds.lead must be from 1 to {len(specs)}; got {bounds.lead}")
    if type(k) is not int or k < 1:
        raise InputError(f"k must be an integer of at least 1; got {k!r}")
    if n > MAX_ROWS:
        raise InputError(f"rows are numbered in 32 bits; got {n} rows; search them in parts")
    arguments = (
        query, list(packed), scales, offsets, base,
        None if bounds is None else bounds.rests, None if bounds is None else bounds.steps,
        torch.tensor([[0, n]]) if visits is None else visits.ranges,
        torch.tensor([0, len(query)]) if visits is None else visits.starts,
        None if visits is None else visits.queries,
        filter_bitmap, k, len(specs) if bounds is None else bounds.lead, unit,
        [spec.key for spec in specs],
    )  # fmt: skip
    return op.mixed_search(*arguments) if impl == "auto" else run("mixed_search", impl, *arguments)


def _check(name: str, t: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if t.dtype != dtype or tuple(t.shape) != shape:
        raise InputError(f"{name} must be {dtype} {shape}; got {t.dtype} {tuple(t.shape)}")
