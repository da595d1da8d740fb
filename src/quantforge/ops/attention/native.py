"""Attention on the CPU by the native library: one pass over the codes for all heads that share."""

from __future__ import annotations

import numpy as np
import torch

from quantforge.ops.native_call import (
    cannot_run,
    loaded,
    packed_of,
    project,
    unit_stride,
    unproject,
)
from quantforge.spec import QuantSpec


def supports(
    query: torch.Tensor,
    k_packed: torch.Tensor,
    k_scales: torch.Tensor,
    k_shift: torch.Tensor | None,
    k_equalizer: torch.Tensor | None,
    v_packed: torch.Tensor,
    v_scales: torch.Tensor,
    v_shift: torch.Tensor | None,
    v_equalizer: torch.Tensor | None,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    k_spec_key: str,
    v_spec_key: str,
) -> str | None:
    """Return why the arguments are not for this backend, or None."""
    specs = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    return cannot_run(*specs, device=k_packed.device)


def attention(
    query: torch.Tensor,
    k_packed: torch.Tensor,
    k_scales: torch.Tensor,
    k_shift: torch.Tensor | None,
    k_equalizer: torch.Tensor | None,
    v_packed: torch.Tensor,
    v_scales: torch.Tensor,
    v_shift: torch.Tensor | None,
    v_equalizer: torch.Tensor | None,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    k_spec_key: str,
    v_spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::attention` on the CPU."""
    k_spec, v_spec = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    lead, (heads, length) = k_packed.shape[:2], query.shape[1:3]
    rows = heads // max(lead[1], 1) * length
    grouped = query.reshape(*lead, rows, k_spec.dim).to(torch.float32)
    out = torch.empty((*lead, rows, v_spec.dim))
    lse = torch.empty((*lead, rows))
    projected = project(grouped, k_equalizer, k_spec, grouped.shape)
    key = packed_of(k_packed, k_scales, k_spec, lead)
    value = packed_of(v_packed, v_scales, v_spec, lead)
    sizes = np.array([*lead, heads // max(lead[1], 1), length, k_packed.shape[2]], np.int64)
    mask = _readable(mask)
    strides = _mask_strides(mask, query.shape[:3])
    loaded().call(
        "qf_attention",
        *(key.pointer, value.pointer, sizes.ctypes.data, projected.data_ptr()),
        None if mask is None else mask.data_ptr(),
        mask is not None and mask.dtype == torch.bool,
        *(strides.ctypes.data, is_causal, scale, out.data_ptr(), lse.data_ptr()),
        torch.get_num_threads(),
    )
    seen = None if v_shift is None else (lse > -torch.inf).to(torch.float32).unsqueeze(-1)
    out = unproject(out, v_spec, v_shift, v_equalizer, seen)
    if k_shift is not None:
        lse += (grouped * k_shift.to(torch.float32)).sum(-1) * scale
    shape = query.shape[:-1]
    return out.view(*shape, v_spec.dim), lse.view(shape)


def _readable(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return a mask of four axes that kernels read: bool or float32, the last axis contiguous."""
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask.to(torch.float32)
    return unit_stride(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))


def _mask_strides(mask: torch.Tensor | None, shape: torch.Size) -> np.ndarray:
    """Return the strides in bytes over batch, head and query: 0 where the mask broadcasts."""
    if mask is None:
        return np.zeros(3, np.int64)
    expanded = mask.expand(*shape, mask.shape[-1])
    return np.array(expanded.stride()[:3], np.int64) * mask.element_size()
