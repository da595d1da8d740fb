"""Scores on the CPU by the native library."""

from __future__ import annotations

import torch

from quantforge.ops.native_call import cannot_run, code_of, loaded, packed_of, project, rows_of
from quantforge.ops.scores.eager import output_like
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
    """Return why the arguments are not for this backend, or None."""
    return cannot_run(QuantSpec.from_key(spec_key), device=packed.device)


def scores(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
    precision: str = "exact",
) -> torch.Tensor:
    """Implement `quantforge::scores` on the CPU."""
    spec = QuantSpec.from_key(spec_key)
    result = output_like(query, packed)
    lead, (queries, n) = result.shape[:-2], result.shape[-2:]
    offset = None
    if shift is not None:
        offset = (query.to(torch.float32) * shift.to(torch.float32)).sum(-1)
        offset = offset.expand(*lead, queries).contiguous()
    projected = project(query, equalizer, spec, torch.Size((*lead, queries, spec.dim)))
    out = result if result.dtype == torch.float32 else result.to(torch.float32)
    target = out
    if packed.shape[:-2].numel() == 1:  # queries of all leading axes meet the same rows
        packed, scales = packed.view(packed.shape[-2:]), scales.view(scales.shape[-2:])
        target = out.view(out.shape[:-1].numel(), n)
        lead, queries = torch.Size(()), target.shape[0]
    operand, rows = packed_of(packed, scales, spec, lead), rows_of(target, lead)
    fast = precision == "fast" and code_of(spec).has_bytes
    loaded().call(
        "qf_scores",
        *(operand.pointer, lead.numel(), queries, n),
        *(projected.data_ptr(), None if offset is None else offset.data_ptr(), rows.pointer),
        *(0, fast, torch.get_num_threads()),
    )
    return out if out is result else result.copy_(out)
