"""Attention over pages in torch: the pages of each sequence are gathered, then attended to."""

from __future__ import annotations

import torch

from quantforge.ops.attention import eager


def paged_attention(
    query: torch.Tensor,
    k_packed: torch.Tensor,
    k_scales: torch.Tensor,
    k_shift: torch.Tensor | None,
    k_equalizer: torch.Tensor | None,
    v_packed: torch.Tensor,
    v_scales: torch.Tensor,
    v_shift: torch.Tensor | None,
    v_equalizer: torch.Tensor | None,
    page_table: torch.Tensor,
    seqlens: torch.Tensor,
    n_tokens: int,
    scale: float,
    k_spec_key: str,
    v_spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::paged_attention` on any device."""
    n_pages = -(-n_tokens // k_packed.shape[2])
    pages = page_table[:, :n_pages].clamp(0, max(len(k_packed) - 1, 0)).long()
    place = torch.arange(n_pages * k_packed.shape[2], device=query.device)
    live = (place < seqlens[:, None])[:, None]  # (B, 1, n)

    def gathered(rows: torch.Tensor) -> torch.Tensor:
        """Return (pages, Hkv, N, width) as (B, Hkv, n, width)."""
        return rows[pages].transpose(1, 2).flatten(2, 3)

    def gathered_scales(scales: torch.Tensor) -> torch.Tensor:
        """Return scales as (B, Hkv, n, 1); zero where a weight of zero would meet a NaN."""
        return gathered(scales).masked_fill(~live[..., None], 0)

    return eager.attention(
        query,
        gathered(k_packed),
        gathered_scales(k_scales),
        k_shift,
        k_equalizer,
        gathered(v_packed),
        gathered_scales(v_scales),
        v_shift,
        v_equalizer,
        live[:, :, None],
        False,
        scale,
        k_spec_key,
        v_spec_key,
    )
