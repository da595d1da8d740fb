"""Public `decode_attention`: validation, then the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantforge.errors import InputError
from quantforge.numerics.pages import page_layout, why_no_pages
from quantforge.ops._library import Impl, load_backend, run
from quantforge.ops.checks import check_floating, check_last_dim, check_statistic
from quantforge.ops.decode_attention import op
from quantforge.spec import QuantSpec


class Pages(NamedTuple):
    """Packed tokens of a batch, and how many of them count.

    Attributes:
        keys: (pages, Hkv, key_bytes) uint8, see `numerics.pages`.
        values: (pages, Hkv, value_bytes) uint8.
        key_spec: the code of keys.
        value_spec: the code of values.
        n_tokens: packed tokens of each row; ignored with `seqlens`.
        seqlens: (B,) int32, packed tokens of each row, on the device.
        page_table: (B, pages of a row) int32, page of each row's tokens; None: row b has pages
            b * n .. (b + 1) * n.
        key_shift: (dim,) or broadcasting (B, Hkv, 1, dim), or None; as given when quantizing.
        key_equalizer: likewise.
        value_shift: likewise.
        value_equalizer: likewise.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_spec: QuantSpec
    value_spec: QuantSpec
    n_tokens: int
    seqlens: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    key_shift: torch.Tensor | None = None
    key_equalizer: torch.Tensor | None = None
    value_shift: torch.Tensor | None = None
    value_equalizer: torch.Tensor | None = None


class Dense(NamedTuple):
    """Sinks and recent tokens of a batch, in the query's dtype.

    Attributes:
        keys: (B, Hkv, n, dim); the first `n_sinks` stand before the packed tokens.
        values: (B, Hkv, n, value dim).
        n_dense: rows of them that count; ignored with `lengths`.
        n_sinks: how many come first.
        lengths: (B,) int32, rows that count, on the device.
    """

    keys: torch.Tensor
    values: torch.Tensor
    n_dense: int
    n_sinks: int = 0
    lengths: torch.Tensor | None = None


def why_not_fused(
    key: QuantSpec, value: QuantSpec, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return why keys and values cannot be attended to by the fused kernel, or None."""
    if device.type != "cuda":
        return f"the fused kernel needs a GPU; got {device}"
    backend = load_backend("decode_attention", "triton")
    return (
        backend if isinstance(backend, str) else backend.why_not(key.key, value.key, device, dtype)
    )


def decode_attention(
    query: torch.Tensor,
    pages: Pages,
    dense: Dense | None = None,
    *,
    starts: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the last q tokens of each row to all of it: sinks, pages, recent rows.

    `softmax(cap(scale * q K^T)) V` over positions `starts[b] <= p <= own position`, where the last
    query row is the last token; with a window, over the last `window` of them.

    Args:
        query: (B, Hq, q, dim); Hq is a multiple of Hkv.
        pages: packed keys and values.
        dense: the rest of the tokens.
        starts: (B,) int32, first position of each row that counts (left padding), on the device.
        mask: bool (True = attend), (B or 1, Hq or 1, q or 1, positions), on top of the rest.
        is_causal: a query sees no position behind its own; False: all of them.
        scale: of the logits; 1 / sqrt(dim) if None.
        softcap: logits become `softcap * tanh(logits / softcap)`; 0: none.
        window: tokens seen by a query, itself included; 0: all.
        impl: "auto", "eager" or "triton" (NVIDIA GPUs, float16 and bfloat16).

    Returns:
        output (B, Hq, q, value dim) in the query's dtype, accumulated in float32, and
        log-sum-exp (B, Hq, q, natural log) in float32. A query that sees nothing gives 0 and -inf.

    Raises:
        InputError: for shapes or dtypes that do not fit, or codes without a page layout.

    Source: arXiv 1706.03762, section 3.2.1; arXiv 2504.19874, Algorithm 1; splits and merge as in
        arXiv 2205.14135, section 3.1.
    Cost: reads each page once per 16 query rows of its key head.
    """
    _check(query, pages, dense, starts)
    _check_mask(mask, query)
    k_dense = v_dense = lengths = None
    n_dense = n_sinks = 0
    if dense is not None:
        k_dense, v_dense, n_dense, n_sinks, lengths = dense
    args = (
        query,
        pages.keys,
        pages.values,
        pages.page_table,
        pages.seqlens,
        pages.n_tokens,
        starts,
        k_dense,
        v_dense,
        lengths,
        n_dense,
        n_sinks,
        mask,
        is_causal,
        pages.key_shift,
        pages.key_equalizer,
        pages.value_shift,
        pages.value_equalizer,
        pages.key_spec.dim**-0.5 if scale is None else scale,
        softcap,
        window,
        pages.key_spec.key,
        pages.value_spec.key,
    )
    return op.decode_attention(*args) if impl == "auto" else run("decode_attention", impl, *args)


def _check(
    query: torch.Tensor, pages: Pages, dense: Dense | None, starts: torch.Tensor | None
) -> None:
    check_floating("query", query)
    check_last_dim("query", query, pages.key_spec.dim)
    if (reason := why_no_pages(pages.key_spec, pages.value_spec)) is not None:
        raise InputError(f"these codes have no page layout: {reason}; use ops.attention on rows")
    layout = page_layout(pages.key_spec, pages.value_spec)
    kv_heads = pages.keys.shape[1] if pages.keys.ndim == 3 else 0
    for name, t, width in (
        ("pages.keys", pages.keys, layout.key_bytes),
        ("pages.values", pages.values, layout.value_bytes),
    ):
        if t.dtype != torch.uint8 or t.ndim != 3 or t.shape[1:] != (kv_heads, width):
            raise InputError(
                f"{name} must be uint8 of shape (pages, Hkv, {width}); got {t.dtype} of shape "
                f"{tuple(t.shape)}"
            )
        if not t.is_contiguous():
            raise InputError(f"{name} must be contiguous; use .contiguous()")
    if query.ndim != 4 or not kv_heads or query.shape[1] % kv_heads or query.stride(-1) != 1:
        raise InputError(
            f"query must be (B, Hq, q, dim) with Hq a multiple of Hkv = {kv_heads} and channels "
            f"next to each other; got {tuple(query.shape)}"
        )
    batch = query.shape[0]
    statistics = (
        ("key_shift", pages.key_shift, layout.key_dim),
        ("key_equalizer", pages.key_equalizer, layout.key_dim),
        ("value_shift", pages.value_shift, layout.value_dim),
        ("value_equalizer", pages.value_equalizer, layout.value_dim),
    )
    for name, statistic, dim in statistics:
        check_statistic(name, statistic, torch.Size((batch, kv_heads, 1, dim)))
    for name, lengths in (("pages.seqlens", pages.seqlens), ("starts", starts)):
        _check_lengths(name, lengths, (batch,))
    if pages.page_table is not None:
        _check_lengths("pages.page_table", pages.page_table, (batch, pages.page_table.shape[-1]))
    elif batch and len(pages.keys) % batch:
        raise InputError(
            f"{len(pages.keys)} pages cannot be shared by {batch} rows; give a page_table"
        )
    if dense is not None:
        _check_lengths("dense.lengths", dense.lengths, (batch,))
        _check_dense(dense, (batch, kv_heads), layout.key_dim, layout.value_dim)


def _check_mask(mask: torch.Tensor | None, query: torch.Tensor) -> None:
    if mask is None:
        return
    fits = mask.ndim == 4 and all(
        size in (1, full) for size, full in zip(mask.shape, query.shape[:3], strict=False)
    )
    if not fits or mask.dtype != torch.bool or mask.stride(-1) != 1:
        raise InputError(
            f"mask must be bool, broadcast to {tuple(query.shape[:3])} and positions, the last of "
            f"them contiguous; got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def _check_lengths(name: str, t: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if t is not None and (t.dtype != torch.int32 or tuple(t.shape) != shape):
        raise InputError(f"{name} must be int32 of shape {shape}; got {t.dtype} {tuple(t.shape)}")


def _check_dense(dense: Dense, lead: tuple[int, int], key_dim: int, value_dim: int) -> None:
    for name, t, dim in (("keys", dense.keys, key_dim), ("values", dense.values, value_dim)):
        if t.ndim != 4 or (*t.shape[:2], t.shape[3]) != (*lead, dim) or t.stride(-1) != 1:
            raise InputError(
                f"dense.{name} must be ({lead[0]}, {lead[1]}, n, {dim}) with channels next to each "
                f"other; got {tuple(t.shape)}"
            )
    if dense.keys.shape[2] != dense.values.shape[2] or dense.n_dense > dense.keys.shape[2]:
        raise InputError(
            f"dense keys and values must have the same rows, at least n_dense = {dense.n_dense}; "
            f"got {dense.keys.shape[2]} and {dense.values.shape[2]}"
        )
