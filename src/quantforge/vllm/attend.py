"""Attention of new tokens to stored ones, by their codes, and to each other, as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantforge.ops.attention import op as attention_op
from quantforge.ops.attention.api import Packed
from quantforge.ops.flash import flash
from quantforge.ops.merge import Partial, dense_attention, fits_flash, merge_partials
from quantforge.vllm.pages import BlockFormat, Statistics


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of a step: those of each sequence behind each other.

    Attributes:
        starts: first token of each sequence, and their number at the end.
        lengths: tokens of each sequence, stored ones and new ones.
        blocks: (sequences, most blocks) int32, the blocks of each sequence.
    """

    starts: list[int]
    lengths: list[int]
    blocks: torch.Tensor


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    batch: Batch,
    block_format: BlockFormat,
    statistics: Statistics,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend causally; new tokens see each other exactly and stored ones by their codes.

    Sequences with one new token each are one launch on a GPU, the others one after the other.

    Args:
        query: (tokens, Hq, dim); Hq is a multiple of Hkv.
        key: (tokens, Hkv, dim), the new ones.
        value: (tokens, Hkv, value dim).
        cache: (blocks, Hkv, N, C) uint8; the new tokens may be stored already, they are not read.
        batch: which tokens belong together.
        block_format: of the cache.
        statistics: of the layer.
        scale: of the logits.
        out: (tokens, Hq, value dim), written; sums are float32.
    """
    new = [stop - start for start, stop in zip(batch.starts, batch.starts[1:], strict=False)]
    together = [i for i, n in enumerate(new) if n == 1] if query.is_cuda else []
    groups = [together] if together else []
    groups += [[i] for i, n in enumerate(new) if n and not (n == 1 and query.is_cuda)]
    for group in groups:
        n = new[group[0]]
        stored = [batch.lengths[i] - n for i in group]
        tokens: slice | torch.Tensor = slice(batch.starts[group[0]], batch.starts[group[0]] + n)
        if len(group) > 1:
            tokens = torch.tensor([batch.starts[i] for i in group], device=query.device)
        q, k, v = (
            t[tokens].view(len(group), n, *t.shape[1:]).transpose(1, 2) for t in (query, key, value)
        )
        partials = [_causal(q, k, v, scale)]
        if most := max(stored):
            used = -(-most // cache.shape[2])
            blocks = batch.blocks[group, :used]
            packed = block_format.read(cache, blocks, statistics)
            partials.append(_history(q, *packed, stored, scale))
        merged = merge_partials(partials) if len(partials) > 1 else partials[0][0]
        out[tokens] = merged.transpose(1, 2).reshape(-1, *out.shape[1:]).to(out.dtype)


def _history(
    query: torch.Tensor, key: Packed, value: Packed, stored: list[int], scale: float
) -> Partial:
    """Attend from (B, Hq, n, dim) to the first `stored` tokens of each sequence."""
    most, mask = max(stored), None
    if min(stored) < most:
        place = torch.arange(most, device=query.device)
        mask = place < torch.tensor(stored, device=query.device)[:, None, None, None]
    return attention_op.attention(
        query,
        *(key.packed[:, :, :most], key.scales[:, :, :most], key.shift, key.equalizer),
        *(value.packed[:, :, :most], value.scales[:, :, :most], value.shift, value.equalizer),
        *(mask, False, scale, key.spec.key, value.spec.key),
    )


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Partial:
    """Attend from new tokens (B, Hq, n, dim) to those up to themselves."""
    n = query.shape[2]
    if n == 1:
        return dense_attention(query, key, value, None, scale)
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        heads = query.shape[1] // key.shape[1]
        repeated = (t.repeat_interleave(heads, 1) for t in (key, value))
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = op(query, *repeated, is_causal=True, scale=scale)
        return out, lse
    if fits_flash(query, key, value):
        return flash(query, key, value, scale, is_causal=True)
    mask = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
    return dense_attention(query, key, value, mask, scale)
