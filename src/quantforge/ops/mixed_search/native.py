"""Mixed search on the CPU by the native library: one call for all groups, rows and queries."""

from __future__ import annotations

import ctypes

import torch

from quantforge.native.integers import IntegerGroup, SearchCall, integer_group, table_bytes
from quantforge.ops.mixed_search.eager import rows_of_keys
from quantforge.ops.native_call import cannot_run, loaded, unit_stride
from quantforge.spec import QuantSpec


def supports(
    query: torch.Tensor,
    packed: list[torch.Tensor],
    scales: torch.Tensor,
    offsets: torch.Tensor,
    base: torch.Tensor,
    rests: torch.Tensor | None,
    steps: torch.Tensor | None,
    ranges: torch.Tensor,
    starts: torch.Tensor,
    visitors: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    lead: int,
    unit: float,
    specs: list[str],
) -> str | None:
    """Return why the arguments are not for this backend, or None."""
    return cannot_run(*(QuantSpec.from_key(key) for key in specs), device=query.device)


def mixed_search(
    query: torch.Tensor,
    packed: list[torch.Tensor],
    scales: torch.Tensor,
    offsets: torch.Tensor,
    base: torch.Tensor,
    rests: torch.Tensor | None,
    steps: torch.Tensor | None,
    ranges: torch.Tensor,
    starts: torch.Tensor,
    visitors: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    lead: int,
    unit: float,
    specs: list[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::mixed_search` on the CPU."""
    rows = [unit_stride(part) for part in packed]
    parsed = [QuantSpec.from_key(key) for key in specs]
    tables = [table_bytes(spec) for spec in parsed]
    groups = (IntegerGroup * len(parsed))(
        *(
            integer_group(spec, part.data_ptr(), part.stride(0))
            for spec, part in zip(parsed, rows, strict=True)
        )
    )
    keys = torch.empty(query.shape[0], k, dtype=torch.int64)
    given = {
        "scales": scales,
        "offsets": offsets,
        "rests": rests,
        "steps": steps,
        "bitmap": filter_bitmap,
        "query": query,
        "range": ranges,
        "visits": starts,
        "visitors": visitors,
        "base": base,
    }
    held = {name: t.contiguous() for name, t in given.items() if t is not None}
    call = SearchCall(
        groups=groups,
        count=len(parsed),
        lead=lead,
        unit=unit,
        threads=torch.get_num_threads(),
        rows=rows[0].shape[0],
        queries=query.shape[0],
        ranges=len(ranges),
        k=k,
        keys=keys.data_ptr(),
        **{name: t.data_ptr() for name, t in held.items()},
    )
    loaded().call("qf_search", ctypes.byref(call))
    del tables, held  # alive until here
    return rows_of_keys(keys)
