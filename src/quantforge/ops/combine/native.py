"""Weighted sums on the CPU by the native library."""

from __future__ import annotations

import torch

from quantforge.ops.combine.eager import output_like
from quantforge.ops.native_call import cannot_run, loaded, packed_of, rows_of, unproject
from quantforge.spec import QuantSpec


def supports(
    weights: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> str | None:
    """Return why the arguments are not for this backend, or None."""
    return cannot_run(QuantSpec.from_key(spec_key), device=packed.device)


def combine(
    weights: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
) -> torch.Tensor:
    """Implement `quantforge::combine` on the CPU."""
    spec = QuantSpec.from_key(spec_key)
    out = output_like(weights, packed, spec.dim)
    total = torch.empty(out.shape, dtype=torch.float32)
    lead, queries, w = out.shape[:-2], out.shape[-2], weights.to(torch.float32)
    if packed.shape[:-2].numel() == 1:  # weights of all leading axes meet the same rows
        packed, scales = packed.view(packed.shape[-2:]), scales.view(scales.shape[-2:])
        w = w.expand(*lead, -1, -1).reshape(total.shape[:-1].numel(), w.shape[-1])
        lead, queries = torch.Size(()), w.shape[0]
    operand, rows = packed_of(packed, scales, spec, lead), rows_of(w, lead)
    loaded().call(
        "qf_combine",
        *(operand.pointer, lead.numel(), queries, packed.shape[-2]),
        *(rows.pointer, total.data_ptr(), torch.get_num_threads()),
    )
    mass = None if shift is None else weights.sum(-1, keepdim=True, dtype=torch.float32)
    return out.copy_(unproject(total, spec, shift, equalizer, mass))
