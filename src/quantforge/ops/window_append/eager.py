"""`window_append` in torch. On a GPU nothing looks at a count: both outcomes are computed."""

from __future__ import annotations

import torch

from quantforge.numerics.pages import PageLayout, page_layout
from quantforge.ops.measure import equalizer_of
from quantforge.ops.pages import (
    codes_of,
    key_pages,
    read_key_pages,
    read_value_pages,
    value_pages,
)
from quantforge.ops.quantize import eager as quantize
from quantforge.spec import QuantSpec


def _measure(
    x: torch.Tensor, count: torch.Tensor, query_rms: torch.Tensor, shifts: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return shift and equalizer of the first `count` of the rows x (..., n, dim).

    As `ops.measure` does; without a shift channels are coded, and measured, about zero. An RMS of
    queries (..., 1, dim) that is zero counts as none.
    """
    x = x.to(torch.float32)
    valid = (torch.arange(x.shape[-2], device=x.device) < count)[:, None]
    n = count.clamp_min(1).to(torch.float32)
    shift = torch.where(valid, x, 0.0).sum(-2, keepdim=True) / n
    square = torch.where(valid, (x - shift if shifts else x).square(), 0.0)
    rms = (square.sum(-2, keepdim=True) / n).sqrt()
    return shift, equalizer_of(rms, query_rms)


def _put(
    buffer: torch.Tensor, dim: int, index: torch.Tensor, new: torch.Tensor, wanted: torch.Tensor
) -> None:
    """Write rows `index` of a buffer where wanted: a scalar on the device, or one of each row.

    What is not wanted may lie behind the end: it writes what is there, in a row of its own.
    """
    index = index.remainder(buffer.shape[dim])
    old = buffer.index_select(dim, index)
    buffer.index_copy_(dim, index, torch.where(wanted, new.to(buffer.dtype), old))


def _pack(
    dense: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    statistics: torch.Tensor,
    n_packed: torch.Tensor,
    n_recent: torch.Tensor,
    due: torch.Tensor,
    n_sinks: int,
    page: int,
    flags: tuple[bool, bool],
    spec: QuantSpec,
    layout: PageLayout | None,
    holds_keys: bool,
) -> None:
    """Fill a page with the first rows behind the sinks where it is due, and move the rest up."""
    recent = dense[:, :, n_sinks:]
    first = due & (n_packed == 0)
    for i, new in enumerate(_measure(recent, n_recent, statistics[2], flags[0])):
        if flags[i]:
            statistics[i] = torch.where(first, new, statistics[i])
    token = torch.arange(page, device=dense.device)
    kept = n_packed % page  # tokens that the page holds already
    source = (token - kept).remainder(page)
    rows, row_scales = quantize.quantize(
        recent.index_select(2, source), statistics[0], statistics[1], spec.key
    )
    if layout is None:
        index, wanted = n_packed - kept + token, (due & (token >= kept))[:, None]
        _put(packed, 2, index, rows, wanted)
        _put(scales, 2, index, row_scales, wanted)
    else:
        make, read = (key_pages, read_key_pages) if holds_keys else (value_pages, read_value_pages)
        index = (n_packed // page)[None]
        at = index.clamp_max(packed.shape[1] - 1)
        old_codes, old_scales = read(packed.index_select(1, at).transpose(1, 2), layout)
        is_old = token < kept
        codes = codes_of(rows, spec.dim, spec.bits)
        codes = torch.where(is_old[:, None], old_codes.to(codes.dtype), codes)
        pages = make(codes, torch.where(is_old, old_scales, row_scales[..., 0]), layout)
        _put(packed, 1, index, pages.transpose(1, 2), due)
    moved = torch.arange(recent.shape[2], device=dense.device) + (page - kept)
    rest = recent.index_select(2, moved.clamp_max(recent.shape[2] - 1))
    recent.copy_(torch.where(due, rest, recent))


def window_append(
    k_dense: torch.Tensor,
    v_dense: torch.Tensor,
    k_packed: torch.Tensor,
    v_packed: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    k_statistics: torch.Tensor,
    v_statistics: torch.Tensor,
    counts: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    n_sinks: int,
    page: int,
    shifts: bool,
    equalizes: bool,
    k_spec_key: str,
    v_spec_key: str,
) -> None:
    """Implement `quantforge::window_append` on any device, without waiting for it."""
    k_spec, v_spec = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    layout = page_layout(k_spec, v_spec) if k_scales.ndim == 1 else None
    rows, q = k_dense.shape[2], key.shape[2]
    capacity = k_packed.shape[2] if layout is None else k_packed.shape[1] * page
    if counts.shape[1] == 0 or q == 0:
        return
    n_packed, n_dense = counts[0, 0].long(), counts[1, 0].long()
    room = page - n_packed % page  # of the page that is filled next
    due = (n_dense + q > rows - page + room) & (n_packed + room <= capacity)
    if k_dense.device.type != "cpu" or bool(due):
        for dense, packed, scales, statistics, spec, holds_keys in (
            (k_dense, k_packed, k_scales, k_statistics, k_spec, True),
            (v_dense, v_packed, v_scales, v_statistics, v_spec, False),
        ):
            _pack(
                *(dense, packed, scales, statistics, n_packed, n_dense - n_sinks, due),
                *(n_sinks, page, (shifts, equalizes), spec, layout, holds_keys),
            )
    moved = room * due
    n_dense = n_dense - moved
    fits = n_dense + q <= rows
    index = n_dense + torch.arange(q, device=k_dense.device)
    _put(k_dense, 2, index, key, fits)
    _put(v_dense, 2, index, value, fits)
    counts[0] += moved.to(torch.int32)
    counts[1] += (q * fits - moved).to(torch.int32)
    counts[2] += (q * ~fits).to(torch.int32)
