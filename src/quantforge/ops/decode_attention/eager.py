"""`decode_attention` in torch: pages are read in full, so this is for checking, not for speed."""

from __future__ import annotations

import torch

from quantforge.numerics.pages import page_layout
from quantforge.ops import constants
from quantforge.ops.pages import read_key_pages, read_value_pages
from quantforge.ops.statistics import equalize_query, restore
from quantforge.spec import QuantSpec


def _rotated(codes: torch.Tensor, scales: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return decoded vectors before their rotation is undone, float32."""
    return constants.centroids(spec, codes.device)[codes.int()] * scales[..., None].float()


def _of_rows(pages: torch.Tensor, page_table: torch.Tensor | None, batch: int) -> torch.Tensor:
    """Return the pages (B, Hkv, pages, bytes) of each row."""
    by_row = pages.unflatten(0, (batch, -1)) if page_table is None else pages[page_table.long()]
    return by_row.transpose(1, 2)


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
    """Implement `quantforge::decode_attention` on any device."""
    k_spec, v_spec = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    layout, device = page_layout(k_spec, v_spec), query.device
    batch, heads, length, _ = query.shape
    kv_heads = k_pages.shape[1]
    q = query.reshape(batch, kv_heads, -1, query.shape[-1]).float()  # rows: head, then query
    counts = torch.full((batch,), n_tokens, device=device) if seqlens is None else seqlens
    dense_counts = torch.full((batch,), n_dense, device=device)
    dense_counts = dense_counts if dense_lens is None else dense_lens
    first = torch.zeros(batch, dtype=torch.int64, device=device) if starts is None else starts

    k = _rotated(*read_key_pages(_of_rows(k_pages, page_table, batch), layout), k_spec)
    v = _rotated(*read_value_pages(_of_rows(v_pages, page_table, batch), layout), v_spec)
    token = torch.arange(k.shape[2], device=device)
    turned = equalize_query(q, k_equalizer) @ constants.rotation(k_spec, k_spec.seed, device).T
    logits = turned @ k.mT
    if k_shift is not None:
        logits = logits + (q * k_shift.float()).sum(-1, keepdim=True)
    places = (n_sinks + token).expand(batch, -1)
    present = token < counts[:, None]
    if k_dense is not None:
        index = torch.arange(k_dense.shape[2], device=device)
        logits = torch.cat([logits, q @ k_dense.float().mT], -1)
        late = torch.where(index < n_sinks, index, index + counts[:, None])
        places = torch.cat([places, late], -1)
        present = torch.cat([present, index < dense_counts[:, None]], -1)
    logits = logits * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)

    own = torch.arange(length, device=device).repeat(heads // kv_heads)
    own = (counts + dense_counts - length)[:, None] + own  # (B, rows)
    seen = (present & (places >= first[:, None]))[:, None]
    if is_causal:
        seen = seen & (places[:, None] <= own[..., None])
    if window:
        seen = seen & (places[:, None] > own[..., None] - window)
    seen = seen[:, None].expand(-1, kv_heads, q.shape[2], -1)  # (B, Hkv, rows, places)
    if mask is not None:
        full = mask.expand(batch, heads, length, -1).reshape(*seen.shape[:3], -1)
        index = places[:, None, None].clamp_max(full.shape[-1] - 1).expand_as(seen)
        seen = seen & full.gather(-1, index)
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
    n_packed = token.shape[0]
    # what was never written may be NaN, which no weight of 0 hides
    v = v.masked_fill(~present[:, None, :n_packed, None], 0.0)
    packed = weights[..., :n_packed] @ v @ constants.rotation(v_spec, v_spec.seed, device)
    mass = weights[..., :n_packed].sum(-1, keepdim=True)
    out = restore(packed, v_shift, v_equalizer, mass)
    if v_dense is not None:
        rows = v_dense.float().masked_fill(~present[:, None, n_packed:, None], 0.0)
        out = out + weights[..., n_packed:] @ rows
    shape = (batch, heads, length)
    return out.reshape(*shape, -1).to(query.dtype), lse.reshape(shape)
