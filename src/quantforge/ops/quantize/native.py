"""Quantization on the CPU by the native library, bit for bit as `numerics.encode`."""

from __future__ import annotations

import torch

from quantforge.numerics.packing import packed_width
from quantforge.ops.native_call import (
    DTYPES,
    cannot_run,
    code_of,
    loaded,
    packed_of,
    rows_of,
    statistic_of,
)
from quantforge.ops.statistics import flatten, is_shared
from quantforge.spec import QuantSpec


def supports(
    x: torch.Tensor, shift: torch.Tensor | None, equalizer: torch.Tensor | None, spec_key: str
) -> str | None:
    """Return why the arguments are not for this backend, or None."""
    spec = QuantSpec.from_key(spec_key)
    if spec.rotation != "hadamard":
        return f"native quantize has Hadamard rotations only, not {spec.rotation}"
    if x.dtype not in DTYPES:
        return f"native kernels do not read {x.dtype}"
    return cannot_run(spec, device=x.device)


def quantize_into(
    packed: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    spec: QuantSpec,
) -> None:
    """Quantize x (..., n, dim) into packed (..., n, bytes) and scales (..., n, 1)."""
    lead = x.shape[:-2]
    rows, out = rows_of(x, lead), packed_of(packed, scales, spec, lead)
    inverse = None if equalizer is None else equalizer.to(torch.float32).reciprocal()
    statistics = statistic_of(shift, lead), statistic_of(inverse, lead)
    loaded().call(
        "qf_quantize",
        code_of(spec).address,
        *(lead.numel(), x.shape[-2], rows.pointer, DTYPES[x.dtype]),
        *statistics[0].arguments,
        *statistics[1].arguments,
        *(out.pointer, torch.get_num_threads()),
    )


def quantize(
    x: torch.Tensor, shift: torch.Tensor | None, equalizer: torch.Tensor | None, spec_key: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::quantize` on the CPU."""
    spec = QuantSpec.from_key(spec_key)
    packed = x.new_empty((*x.shape[:-1], packed_width(spec)), dtype=torch.uint8)
    scales = x.new_empty((*x.shape[:-1], 1), dtype=getattr(torch, spec.scale_dtype))
    if is_shared(shift) and is_shared(equalizer):  # one long axis: full tiles
        rows = packed.view(-1, packed.shape[-1]), scales.view(-1, 1)
        quantize_into(*rows, x.reshape(-1, spec.dim), flatten(shift), flatten(equalizer), spec)
    else:
        quantize_into(packed, scales, x, shift, equalizer, spec)
    return packed, scales
