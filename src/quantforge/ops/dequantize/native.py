"""Dequantization on the CPU by the native library."""

from __future__ import annotations

import torch

from quantforge.ops.native_call import (
    DTYPES,
    cannot_run,
    loaded,
    packed_of,
    rows_of,
    statistic_of,
)
from quantforge.ops.statistics import flatten, is_shared
from quantforge.spec import QuantSpec


def supports(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
    dtype: torch.dtype,
) -> str | None:
    """Return why the arguments are not for this backend, or None."""
    spec = QuantSpec.from_key(spec_key)
    if spec.rotation != "hadamard":
        return f"native dequantize has Hadamard rotations only, not {spec.rotation}"
    if dtype not in DTYPES:
        return f"native kernels do not write {dtype}"
    return cannot_run(spec, device=packed.device)


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec_key: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Implement `quantforge::dequantize` on the CPU."""
    spec = QuantSpec.from_key(spec_key)
    out = torch.empty((*packed.shape[:-1], spec.dim), dtype=dtype)
    target = out
    if is_shared(shift) and is_shared(equalizer):  # one long axis: full tiles
        packed, scales = (t.reshape(-1, t.shape[-1]) for t in (packed, scales))
        shift, equalizer = flatten(shift), flatten(equalizer)
        target = out.view(-1, spec.dim)
    lead = target.shape[:-2]
    operand, rows = packed_of(packed, scales, spec, lead), rows_of(target, lead)
    statistics = statistic_of(shift, lead), statistic_of(equalizer, lead)
    loaded().call(
        "qf_dequantize",
        *(operand.pointer, lead.numel(), target.shape[-2]),
        *statistics[0].arguments,
        *statistics[1].arguments,
        *(rows.pointer, DTYPES[dtype], torch.get_num_threads()),
    )
    return out
