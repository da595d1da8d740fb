"""Public `paged_attention`: validation, then the operator."""

from __future__ import annotations

import torch

from quantforge.errors import InputError
from quantforge.ops._library import Impl, run
from quantforge.ops.checks import check_floating, check_last_dim, check_packed, check_statistic
from quantforge.ops.paged_attention import op
from quantforge.spec import QuantSpec


def paged_attention(
    query: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    values: tuple[torch.Tensor, torch.Tensor],
    key_spec: QuantSpec,
    value_spec: QuantSpec,
    page_table: torch.Tensor,
    seqlens: torch.Tensor,
    *,
    n_tokens: int | None = None,
    key_shift: torch.Tensor | None = None,
    key_equalizer: torch.Tensor | None = None,
    value_shift: torch.Tensor | None = None,
    value_equalizer: torch.Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from each sequence to all of its tokens: `softmax(scale * q K^T) V`.

    Token t of sequence b is row `t % N` of page `page_table[b, t // N]`. Rows behind the last
    token, and entries of the table behind the last page, may hold anything.

    Args:
        query: (B, Hq, q, dim) float tensor; Hq is a multiple of Hkv.
        keys: packed rows (pages, Hkv, N, bytes) and scales (pages, Hkv, N, 1), of any strides.
        values: likewise; dim and bits may differ from the keys'.
        key_spec: the code of keys.
        value_spec: the code of values.
        page_table: (B, pages of a sequence) int32, on the device.
        seqlens: (B,) int32, tokens of each sequence, on the device; below 1: none.
        n_tokens: no sequence has more; None: what the table can hold. Work is shared out by it.
        key_shift: (dim,) or broadcasting (B, Hkv, 1, dim), or None; as given when quantizing.
        key_equalizer: likewise.
        value_shift: likewise.
        value_equalizer: likewise.
        scale: of the logits; 1 / sqrt(dim) if None.
        impl: "auto" takes the fastest backend that supports the call; a named one never falls back.

    Returns:
        output (B, Hq, q, value dim) and log-sum-exp (B, Hq, q, natural log), both float32. A
        sequence without tokens gives 0 and -inf.

    Raises:
        InputError: for shapes or dtypes that do not fit.
        UnsupportedError: if a named backend cannot run the call.

    Source: arXiv 1706.03762, section 3.2.1; arXiv 2504.19874, Algorithm 1; pages as in
        arXiv 2309.06180, section 4.1.
    Cost: reads the codes of each sequence once per 16 query rows of a key head; nothing waits for
        the device.
    """
    check_floating("query", query)
    check_last_dim("query", query, key_spec.dim)
    check_packed("keys", *keys, key_spec)
    check_packed("values", *values, value_spec)
    _check_shapes(query, keys[0], values[0], page_table, seqlens)
    lead = (query.shape[0], keys[0].shape[1], 1)
    for name, statistic, spec in (
        ("key_shift", key_shift, key_spec),
        ("key_equalizer", key_equalizer, key_spec),
        ("value_shift", value_shift, value_spec),
        ("value_equalizer", value_equalizer, value_spec),
    ):
        check_statistic(name, statistic, torch.Size((*lead, spec.dim)))
    capacity = page_table.shape[1] * keys[0].shape[2]
    args = (
        *(query, *keys, key_shift, key_equalizer, *values, value_shift, value_equalizer),
        *(page_table, seqlens, capacity if n_tokens is None else min(n_tokens, capacity)),
        key_spec.dim**-0.5 if scale is None else scale,
        *(key_spec.key, value_spec.key),
    )
    return op.paged_attention(*args) if impl == "auto" else run("paged_attention", impl, *args)


def _check_shapes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    page_table: torch.Tensor,
    seqlens: torch.Tensor,
) -> None:
    shapes = f"query {tuple(query.shape)}, keys {tuple(key.shape)}, values {tuple(value.shape)}"
    if query.ndim != 4 or key.ndim != 4 or key.shape[:3] != value.shape[:3]:
        raise InputError(
            "query must be (B, Hq, q, dim), keys and values packed (pages, Hkv, N, bytes) with the "
            f"same pages, Hkv and N; got {shapes}"
        )
    if not key.shape[1] or query.shape[1] % key.shape[1]:
        raise InputError(f"Hq must be a multiple of Hkv; got {shapes}")
    batch = query.shape[0]
    fits = (
        page_table.ndim == 2 and page_table.shape[0] == batch and tuple(seqlens.shape) == (batch,)
    )
    if not fits or page_table.dtype != torch.int32 or seqlens.dtype != torch.int32:
        raise InputError(
            f"page_table must be ({batch}, pages) and seqlens ({batch},), both int32; got "
            f"{page_table.dtype} {tuple(page_table.shape)} and {seqlens.dtype} "
            f"{tuple(seqlens.shape)}"
        )
