"""Attention of new tokens to stored ones, by their codes, and to each other, as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from quantforge.ops.attention import op as attention_op
from quantforge.ops.attention.api import Packed
from quantforge.ops.flash import flash
from quantforge.ops.merge import Partial, dense_attention, fits_flash, merge_partials
from quantforge.ops.paged_attention import op as paged_attention_op
from quantforge.vllm.pages import BlockFormat, Statistics

Rows = slice | torch.Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of a step: those of each sequence behind each other.

    Attributes:
        starts: first token of each sequence, and their number at the end.
        stored: (sequences,) int32, tokens before this step, on the device.
        most: no sequence has more of them.
        stored_list: the same numbers as `stored`, where the host has to know them: of sequences
            with several new tokens on a GPU, of all sequences elsewhere.
        blocks: (sequences, most blocks) int32, the blocks of each sequence, on the device.
    """

    starts: list[int]
    stored: torch.Tensor
    most: int
    stored_list: list[int]
    blocks: torch.Tensor

    @cached_property
    def new(self) -> list[int]:
        """New tokens of each sequence."""
        pairs = zip(self.starts, self.starts[1:], strict=False)
        return [stop - start for start, stop in pairs]

    @cached_property
    def single(self) -> tuple[Rows, Rows] | None:
        """Sequences with one new token and these tokens, or None; first ones need no copy."""
        found = [i for i, n in enumerate(self.new) if n == 1]
        if not found:
            return None
        if found[-1] == len(found) - 1:
            return slice(len(found)), slice(len(found))
        places = torch.tensor([found, [self.starts[i] for i in found]])
        if self.stored.is_cuda:
            places = places.pin_memory().to(self.stored.device, non_blocking=True)
        return places[0], places[1]


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

    On a GPU, sequences with one new token are attended to together and nothing waits for the
    device; a batch of them alone can be captured in a CUDA graph. Others come one after the other.

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
    together = query.is_cuda
    if together and batch.single is not None:
        attend_single(query, key, value, cache, batch, block_format, statistics, scale, out)
    for i, n in enumerate(batch.new):
        if n == 0 or (n == 1 and together):
            continue
        tokens = slice(batch.starts[i], batch.starts[i] + n)
        q, k, v = (t[None, tokens].transpose(1, 2) for t in (query, key, value))
        partials = [_causal(q, k, v, scale)]
        if stored := batch.stored_list[i]:
            blocks = batch.blocks[i : i + 1, : -(-stored // cache.shape[2])]
            packed = block_format.read(cache, blocks, statistics)
            partials.append(_history(q, *packed, stored, scale))
        merged = merge_partials(partials) if len(partials) > 1 else partials[0][0]
        out[tokens] = merged[0].transpose(0, 1).to(out.dtype)


def attend_single(
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
    """Attend from the sequences with one new token, `batch.single`; arguments as of `attend`.

    Two segments merge as in `ops.merge`; the weight of the second, one token, is a sigmoid.
    """
    assert batch.single is not None, "attend has looked"
    sequences, tokens = batch.single
    q = query[tokens]
    keys, values = block_format.pages(cache)
    history, lse = paged_attention_op.paged_attention(
        q.unsqueeze(2),
        *(*keys, statistics.key_shift, statistics.key_equalizer),
        *(*values, statistics.value_shift, statistics.value_equalizer),
        *(batch.blocks[sequences], batch.stored[sequences]),
        min(batch.most, batch.blocks.shape[1] * cache.shape[2]),
        *(scale, block_format.key_spec.key, block_format.value_spec.key),
    )
    shape = (key.shape[1], -1)  # query heads of each key head
    k, v = (t[tokens].unsqueeze(2).to(torch.float32) for t in (key, value))
    logits = (q.unflatten(1, shape).to(torch.float32) * k).sum(-1) * scale
    weight = torch.sigmoid(logits - lse.squeeze(2).unflatten(1, shape)).unsqueeze(-1)
    merged = torch.lerp(history.squeeze(2).unflatten(1, shape), v, weight)
    out[tokens] = merged.flatten(1, 2).to(out.dtype)


def _history(query: torch.Tensor, key: Packed, value: Packed, stored: int, scale: float) -> Partial:
    """Attend from (1, Hq, n, dim) to the first `stored` tokens."""
    return attention_op.attention(
        query,
        *(key.packed[:, :, :stored], key.scales[:, :, :stored], key.shift, key.equalizer),
        *(value.packed[:, :, :stored], value.scales[:, :, :stored], value.shift, value.equalizer),
        *(None, False, scale, key.spec.key, value.spec.key),
    )


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Partial:
    """Attend from new tokens (1, Hq, n, dim) to those up to themselves."""
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
