"""Launcher of the fused decode kernel: attend split by split, merge.

Two launches whatever the length. The grid depends on shapes and host-side lengths only; with
lengths on the device it covers the capacity, and programs beyond a row's length return at once, so
a captured graph stays valid while the rows grow.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from quantforge.numerics.pages import why_no_pages
from quantforge.ops import constants
from quantforge.ops.decode_attention import extend
from quantforge.ops.decode_attention.plan import (
    Plan,
    ceil_div,
    cut,
    merge_shape,
    plan_of,
)
from quantforge.ops.decode_attention.splits import merge_kernel
from quantforge.ops.launch import cannot_run_on, capability, multiprocessors
from quantforge.ops.merge import merge_partials
from quantforge.ops.statistics import equalize_query, restore
from quantforge.spec import QuantSpec

LOG2E = 1.4426950408889634


def supports(query: torch.Tensor, *args: object) -> str | None:
    """Return why the fused kernel cannot run these arguments, or None."""
    if (reason := cannot_run_on(query.device)) is not None:
        return reason
    if query.device.type != "cuda":
        return "Gluon kernels do not run in the interpreter"
    k_dense = args[6]
    if isinstance(k_dense, torch.Tensor) and k_dense.dtype != query.dtype:
        return f"query is {query.dtype} and the dense rows are {k_dense.dtype}"
    return why_not(str(args[-2]), str(args[-1]), query.device, query.dtype)


@lru_cache
def why_not(
    k_spec_key: str, v_spec_key: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return why the fused kernel cannot run these codes on a GPU, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the model computes in {dtype}; the tensor cores take float16 and bfloat16"
    k_spec, v_spec = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    if (reason := why_no_pages(k_spec, v_spec)) is not None:
        return reason
    needed = (8, 9) if "e4m3" in (k_spec.codebook, v_spec.codebook) else (8, 0)
    if (found := capability(device)) < needed:
        return f"it needs an NVIDIA GPU of compute capability {needed}; this one has {found}"
    return None


class Places(NamedTuple):
    """Which tokens there are and who sees them: arguments of `decode_attention` as they came."""

    page_table: torch.Tensor | None
    seqlens: torch.Tensor | None
    n_tokens: int
    starts: torch.Tensor | None
    dense_lens: torch.Tensor | None
    n_dense: int
    n_sinks: int
    mask: torch.Tensor | None
    is_causal: bool
    window: int


class Segment(NamedTuple):
    """Pages of keys and values and their statistics."""

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    k_equalizer: torch.Tensor | None = None
    k_shift: torch.Tensor | None = None
    v_equalizer: torch.Tensor | None = None
    v_shift: torch.Tensor | None = None


def decode_attention(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor | None,
    seqlens: torch.Tensor | None,
    n_tokens: int,
    starts: torch.Tensor | None,
    k_dense: torch.Tensor | None,
    v_dense: torch.Tensor | None,
    dense_lens: torch.Tensor | None,
    n_dense: int,
    n_sinks: int,
    mask: torch.Tensor | None,
    is_causal: bool,
    k_shift: torch.Tensor | None,
    k_equalizer: torch.Tensor | None,
    v_shift: torch.Tensor | None,
    v_equalizer: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    k_spec_key: str,
    v_spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::decode_attention` on NVIDIA GPUs."""
    plan = plan_of(k_spec_key, v_spec_key, query.device)
    kv_heads = k_pages.shape[1]
    rows = query.shape[1] // kv_heads * query.shape[2]
    if rows >= extend.MIN_ROWS:
        varying = (seqlens, dense_lens, starts, mask)
        varies = any(t is not None for t in varying) or softcap != 0 or window != 0
        n_own = 0 if k_dense is None else n_dense - n_sinks
        key_value = (k_spec_key, v_spec_key)
        fits = extend.reason_against(query, kv_heads, n_tokens, n_own, is_causal, varies, key_value)
        if fits is None:
            return extend.extend_attention(
                query, k_pages, v_pages, page_table, n_tokens, k_dense, v_dense, n_dense,
                is_causal, k_shift, k_equalizer, v_shift, v_equalizer, scale, *key_value,
            )  # fmt: skip
    places = Places(
        page_table, seqlens, n_tokens, starts, dense_lens, n_dense, n_sinks, mask, is_causal, window
    )
    packed = Segment(k_pages, v_pages, k_equalizer, k_shift, v_equalizer, v_shift)
    if plan.turns is not None:
        return _attend(query, packed, k_dense, v_dense, places, scale, softcap, plan)
    return _attend_by_matrix(
        query, packed, k_dense, v_dense, places, scale, softcap, plan, k_spec_key, v_spec_key
    )


def _strides(statistic: torch.Tensor | None) -> tuple[int, int]:
    """Return the strides of a statistic (dim,) or (..., 1, dim) over batch and head."""
    if statistic is None or statistic.ndim < 4:
        return 0, statistic.stride(0) if statistic is not None and statistic.ndim == 3 else 0
    b, h = statistic.stride()[:2]
    return (b if statistic.shape[0] > 1 else 0), (h if statistic.shape[1] > 1 else 0)


def _mask_strides(mask: torch.Tensor | None) -> tuple[int, int, int]:
    """Return the strides of a mask over batch, query heads and queries, 0 where it broadcasts."""
    if mask is None:
        return 0, 0, 0
    b, h, q = (
        stride if size > 1 else 0
        for stride, size in zip(mask.stride()[:3], mask.shape[:3], strict=True)
    )
    return b, h, q


def _attend(
    query: torch.Tensor,
    packed: Segment,
    k_dense: torch.Tensor | None,
    v_dense: torch.Tensor | None,
    places: Places,
    scale: float,
    softcap: float,
    plan: Plan,
    *,
    has_pages: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to pages (not without `has_pages`) and dense rows; outputs in the query's dtype."""
    from quantforge.ops.decode_attention.fused import decode_kernel

    device, layout, tuning = query.device, plan.layout, plan.tuning
    pdl = bool(plan.constants["PDL"])
    batch, heads, q_len, _ = query.shape
    kv_heads, v_dim = packed.k_pages.shape[1], layout.value_dim
    rows = heads // kv_heads * q_len
    width = 8 if rows <= 8 else 16
    groups, key_heads = ceil_div(rows, width), batch * kv_heads
    page_table, mask = places.page_table, places.mask
    pages_per_row = page_table.shape[1] if page_table is not None else len(packed.k_pages) // batch
    n_pages = pages_per_row
    if places.seqlens is None:
        n_pages = ceil_div(places.n_tokens, layout.tokens)
    dense_rows = 0
    if k_dense is not None:
        dense_rows = places.n_dense if places.dense_lens is None else k_dense.shape[2]
    fit = tuning.programs[width == 16] * multiprocessors(device)  # on the GPU at once
    most = max(fit // max(key_heads * groups, 1), 1)
    n_pages = n_pages if has_pages else 0
    n_splits, per_split = cut(n_pages, dense_rows, most, tuning.pages)

    out = query.new_empty((batch, heads, q_len, v_dim))
    lse = query.new_empty((batch, heads, q_len), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if n_splits == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    partial = lse.new_empty((key_heads, n_splits, rows, v_dim))
    partial_lse = lse.new_empty((key_heads, n_splits, rows))
    dense_strides = (0,) * 6
    if k_dense is not None and v_dense is not None:
        dense_strides = (*k_dense.stride()[:3], *v_dense.stride()[:3])
    k_turn, v_turn = plan.turns or (None, None)
    decode_kernel[(groups, n_splits, key_heads)](
        query, packed.k_equalizer, packed.k_shift, k_turn, packed.k_pages, packed.v_pages,
        *plan.tables, packed.v_equalizer, packed.v_shift, v_turn,
        page_table, places.seqlens, places.starts, places.dense_lens, k_dense, v_dense, mask,
        partial, partial_lse, places.n_tokens, places.n_dense, places.n_sinks, places.window,
        per_split, n_pages, pages_per_row, rows, q_len,
        softcap * LOG2E, scale * LOG2E, *query.stride()[:3], *_strides(packed.k_equalizer),
        *_strides(packed.k_shift), *_strides(packed.v_equalizer), *_strides(packed.v_shift),
        *dense_strides, *_mask_strides(mask),
        HKV=kv_heads, N=width, SOFTCAP=softcap != 0, WINDOW=places.window != 0,
        CAUSAL=places.is_causal, HAS_DENSE=k_dense is not None, **plan.constants,
        num_warps=1, maxnreg=tuning.registers[width == 16], launch_pdl=pdl,
    )  # fmt: skip
    merge = merge_shape(rows, key_heads, v_dim, n_splits, device)
    merge_kernel[(ceil_div(rows, merge.rows), v_dim // merge.columns, key_heads)](
        partial, partial_lse, out, lse, n_splits, rows,
        DV=v_dim, ROWS=merge.rows, COLUMNS=merge.columns, SPLITS=merge.splits, CHUNK=merge.chunk,
        PDL=pdl, num_warps=merge.warps, launch_pdl=pdl,
    )  # fmt: skip
    return out, lse


def _attend_by_matrix(
    query: torch.Tensor,
    packed: Segment,
    k_dense: torch.Tensor | None,
    v_dense: torch.Tensor | None,
    places: Places,
    scale: float,
    softcap: float,
    plan: Plan,
    k_spec_key: str,
    v_spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend where a rotation is a matrix: turned by torch, pages and dense rows apart."""
    k_spec, v_spec = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    batch, heads, q_len, dim = query.shape
    kv_heads = packed.k_pages.shape[1]
    grouped = query.reshape(batch, kv_heads, -1, dim)
    rotation = constants.rotation(k_spec, k_spec.seed, query.device)
    turned = (equalize_query(grouped, packed.k_equalizer) @ rotation.T).view(query.shape)
    shift = packed.k_shift
    if shift is not None:  # q . shift = (R equalizer q) . (R shift / equalizer)
        shift = shift.to(torch.float32)
        if packed.k_equalizer is not None:
            shift = shift / packed.k_equalizer.to(torch.float32)
        shift = shift @ rotation.T
    bare = Segment(packed.k_pages, packed.v_pages, k_shift=shift)
    sums, lse = _attend(turned, bare, None, None, places, scale, softcap, plan)
    sums = sums.view(batch, kv_heads, -1, v_spec.dim)
    sums = sums @ constants.rotation(v_spec, v_spec.seed, query.device)
    seen = (lse > -torch.inf).to(torch.float32).view(batch, kv_heads, -1, 1)
    out = restore(sums, packed.v_shift, packed.v_equalizer, seen)
    out = out.view(batch, heads, q_len, v_spec.dim)
    if k_dense is not None:
        dense, dense_lse = _attend(
            query, bare, k_dense, v_dense, places, scale, softcap, plan, has_pages=False
        )
        out = merge_partials([(out, lse), (dense, dense_lse)])
        lse = torch.logaddexp(lse, dense_lse)
    return out.to(query.dtype), lse
