"""Public `window_append`: the buffers of a static cache layer, validation, then the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantforge.errors import InputError
from quantforge.numerics.packing import packed_width
from quantforge.numerics.pages import PageLayout, page_layout
from quantforge.ops._library import Impl, run
from quantforge.ops.checks import check_floating
from quantforge.ops.window_append import op
from quantforge.spec import QuantSpec

PACKED, DENSE, LOST, TICKET = range(4)
"""Rows of `Window.counts`."""


class Window(NamedTuple):
    """Buffers of keys and values with a fixed address each.

    Attributes:
        k_dense: (B, Hkv, capacity, dim): sinks, then recent tokens in their order.
        v_dense: (B, Hkv, capacity, value dim).
        k_packed: (B, Hkv, tokens, bytes) uint8 rows, or (B, pages, Hkv, bytes) of `numerics.pages`.
        v_packed: likewise.
        k_scales: (B, Hkv, tokens, 1) of rows; (0,) of pages, which hold theirs.
        v_scales: likewise.
        k_statistics: (3, B, Hkv, 1, dim) float32: shift and equalizer, zeros and ones before they
            are measured, and the RMS of the queries' channels, zeros where none was seen.
        v_statistics: (3, B, Hkv, 1, value dim); values meet no queries.
        counts: (4, B) int32: packed tokens, dense rows, tokens that found no room, and in the last
            row what the kernel counts with. All sequences of a batch have the same length.
            Packed tokens need not fill their last page: the next ones do.
    """

    k_dense: torch.Tensor
    v_dense: torch.Tensor
    k_packed: torch.Tensor
    v_packed: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor
    k_statistics: torch.Tensor
    v_statistics: torch.Tensor
    counts: torch.Tensor


def new_window(
    key: torch.Tensor,
    value: torch.Tensor,
    rows: int,
    tokens: int,
    layout: PageLayout | None,
    specs: tuple[QuantSpec, QuantSpec],
) -> Window:
    """Return an empty window for keys and values like (B, Hkv, n, dim).

    Args:
        key: a tensor of the shape, dtype and device of keys.
        value: likewise.
        rows: capacity of dense rows.
        tokens: capacity of packed tokens, whole pages.
        layout: of the pages, or None for rows.
        specs: codes of keys and of values.
    """
    key_bytes, value_bytes = (0, 0) if layout is None else (layout.key_bytes, layout.value_bytes)
    k = _buffers(key, rows, tokens, layout, key_bytes, specs[0])
    v = _buffers(value, rows, tokens, layout, value_bytes, specs[1])
    counts = key.new_zeros((4, key.shape[0]), dtype=torch.int32)
    return Window(k[0], v[0], k[1], v[1], k[2], v[2], k[3], v[3], counts)


def _buffers(
    x: torch.Tensor,
    rows: int,
    tokens: int,
    layout: PageLayout | None,
    page_bytes: int,
    spec: QuantSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dense rows, packed tokens, scales and statistics."""
    batch, heads, _, dim = x.shape
    shape: tuple[int, ...] = (batch, heads, tokens, packed_width(spec))
    n_scales: tuple[int, ...] = (batch, heads, tokens, 1)
    if layout is not None:
        shape, n_scales = (batch, tokens // layout.tokens, heads, page_bytes), (0,)
    statistics = x.new_zeros((3, batch, heads, 1, dim), dtype=torch.float32)
    statistics[1].fill_(1.0)
    return (
        x.new_zeros((batch, heads, rows, dim)),
        x.new_zeros(shape, dtype=torch.uint8),
        x.new_zeros(n_scales, dtype=torch.float16),
        statistics,
    )


def window_append(
    window: Window,
    key: torch.Tensor,
    value: torch.Tensor,
    specs: tuple[QuantSpec, QuantSpec],
    *,
    n_sinks: int,
    page: int,
    shift: bool = True,
    equalizer: bool = True,
    impl: Impl = "auto",
) -> None:
    """Write q tokens behind the dense rows; where they do not fit, pack the oldest page first.

    The page is the first `page` rows behind the sinks; the rows behind it move up. A page of which
    n tokens are held already, after a crop, takes `page - n` rows as soon as n rows less would have
    room, so that full pages are as many dense rows apart as ever. Before the first page is packed,
    shift and equalizer are measured on all recent rows, and on the queries seen. Tokens for which
    there is no room, because the packed buffer is full, are counted and left out.

    Nothing waits for the device, and the launches do not depend on any length, so a captured graph
    can be replayed as the window fills.

    Args:
        window: buffers, written.
        key: (B, Hkv, q, dim) with q <= page and q <= capacity - n_sinks - page + 1, in the dtype of
            the dense rows.
        value: (B, Hkv, q, value dim).
        specs: codes of keys and of values.
        n_sinks: rows at the start that are never packed.
        page: tokens packed at a time; those of a page of the layout where there are pages.
        shift: measure a shift (else what the statistics hold stays).
        equalizer: measure an equalizer.
        impl: "auto", "eager" or "triton".

    Raises:
        InputError: for shapes or dtypes that do not fit.
        UnsupportedError: if a named backend cannot run the call.

    Source: arXiv 2504.19874, Algorithm 1, for the codes.
    Cost: writes q rows; every `page` tokens reads a page, and reads and writes the window once.
    """
    _check(window, key, value, specs, n_sinks, page)
    args = (*window, key, value, n_sinks, page, shift, equalizer, specs[0].key, specs[1].key)
    op.window_append(*args) if impl == "auto" else run("window_append", impl, *args)


def _check(
    window: Window,
    key: torch.Tensor,
    value: torch.Tensor,
    specs: tuple[QuantSpec, QuantSpec],
    n_sinks: int,
    page: int,
) -> None:
    check_floating("key", key)
    batch, heads, rows, _ = window.k_dense.shape
    for name, x, dense in (("key", key, window.k_dense), ("value", value, window.v_dense)):
        expected = (batch, heads, key.shape[2] if key.ndim == 4 else -1, dense.shape[3])
        if x.dtype != dense.dtype or tuple(x.shape) != expected:
            raise InputError(
                f"{name} must be {dense.dtype} of shape ({batch}, {heads}, q, {dense.shape[3]}), "
                f"the same q for both; got {x.dtype} of shape {tuple(x.shape)}"
            )
    most = min(page, rows - n_sinks - page + 1)
    if key.shape[2] > most:
        raise InputError(
            f"at most {most} tokens can be appended at once here (a page of {page}, and {rows} "
            f"dense rows of which {n_sinks} are sinks); got {key.shape[2]}; append in pieces"
        )
    if not all(t.is_contiguous() for t in window):
        raise InputError("the buffers of a window must be contiguous; see new_window")
    if window.k_scales.ndim == 1 and page_layout(*specs).tokens != page:
        raise InputError(
            f"pages of these codes hold {page_layout(*specs).tokens} tokens; got page={page}"
        )
