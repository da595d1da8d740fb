"""The layout of a block of vLLM's cache: the bytes of each head hold rows of codes, then scales.

    block b, head h     [ N key rows ][ N value rows ][ N fp16 key scales ][ N fp16 value scales ]

vLLM sees (blocks, heads, N, C) bytes, where N is the tokens of a block and C the bytes of a token.
It moves blocks as they are, so what is in them is ours. Rows are those of `numerics.packing`: a
token is written without touching its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from quantforge.errors import InputError
from quantforge.numerics.packing import row_bytes
from quantforge.ops.attention.api import Packed
from quantforge.ops.quantize import op as quantize_op
from quantforge.spec import QuantSpec


class Statistics(NamedTuple):
    """Shift and equalizer of the keys and values of a layer, each (Hkv, 1, dim) or None."""

    key_shift: torch.Tensor | None = None
    key_equalizer: torch.Tensor | None = None
    value_shift: torch.Tensor | None = None
    value_equalizer: torch.Tensor | None = None


Pages = tuple[torch.Tensor, torch.Tensor]
"""Rows (blocks, Hkv, N, bytes) and scales (blocks, Hkv, N, 1)."""


class _Parts(NamedTuple):
    """Views of a cache: rows (blocks * Hkv, N, bytes) and scales (blocks * Hkv, N, 1)."""

    key_rows: torch.Tensor
    value_rows: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor


@dataclass(frozen=True)
class BlockFormat:
    """How the tokens of a layer are stored.

    Attributes:
        key_spec: the code of keys.
        value_spec: the code of values.
    """

    key_spec: QuantSpec
    value_spec: QuantSpec

    def _parts(self, cache: torch.Tensor) -> _Parts:
        blocks, heads, tokens, width = cache.shape
        widths = [row_bytes(s.dim, s.bits) for s in (self.key_spec, self.value_spec)]
        if cache.dtype != torch.uint8 or not cache.is_contiguous() or width != sum(widths) + 4:
            raise InputError(
                f"a cache must be contiguous uint8 of shape (blocks, Hkv, tokens, "
                f"{sum(widths) + 4}); got {cache.dtype} of shape {tuple(cache.shape)}"
            )
        data = cache.view(blocks * heads, tokens * width)
        found: list[torch.Tensor] = []
        start = 0
        for each in (*widths, 2, 2):
            part = data[:, start : start + tokens * each]
            start += tokens * each
            part = part if len(found) < 2 else part.view(torch.float16)
            found.append(part.unflatten(1, (tokens, -1)))
        return _Parts(*found)

    def pages(self, cache: torch.Tensor) -> tuple[Pages, Pages]:
        """Return keys and values as `ops.paged_attention` reads them: views, nothing is moved."""
        key_rows, value_rows, key_scales, value_scales = (
            part.unflatten(0, cache.shape[:2]) for part in self._parts(cache)
        )
        return (key_rows, key_scales), (value_rows, value_scales)

    def store(
        self,
        cache: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        statistics: Statistics,
    ) -> None:
        """Quantize tokens into their slots, in place, without waiting for the device.

        Values are not checked: a bad vector gets a scale that is not finite and shows up as NaN.

        Args:
            cache: (blocks, Hkv, N, C) uint8, contiguous, written.
            key: (tokens, Hkv, dim).
            value: (tokens, Hkv, value dim).
            slots: (tokens,) int64, block times N plus the place in it; a negative one goes to slot
                0, as vLLM gives block 0 to nobody.
            statistics: of the layer.
        """
        parts = self._parts(cache)
        heads, tokens = cache.shape[1:3]
        slots = slots.clamp_min(0)
        block, place = slots // tokens, slots % tokens
        region = block[:, None] * heads + torch.arange(heads, device=slots.device)
        place = place[:, None].expand_as(region)
        key_rows, key_scales = _quantize(key, statistics[:2], self.key_spec)
        value_rows, value_scales = _quantize(value, statistics[2:], self.value_spec)
        found = (key_rows, value_rows, key_scales, value_scales)
        for part, new in zip(parts, found, strict=True):
            part[region, place] = new

    def read(
        self, cache: torch.Tensor, blocks: torch.Tensor, statistics: Statistics
    ) -> tuple[Packed, Packed]:
        """Gather the blocks (B, n) of sequences as packed keys and values (B, Hkv, n * N, ...).

        Cost: reads and writes the codes once.
        """
        heads = cache.shape[1]
        batch, n = blocks.shape
        head = torch.arange(heads, device=blocks.device)
        region = (blocks[:, None].long() * heads + head[:, None]).flatten()
        key_rows, value_rows, key_scales, value_scales = (
            part.index_select(0, region).view(batch, heads, n * part.shape[1], -1)
            for part in self._parts(cache)
        )
        k_shift, k_equalizer, v_shift, v_equalizer = statistics
        return (
            Packed(key_rows, key_scales, self.key_spec, k_shift, k_equalizer),
            Packed(value_rows, value_scales, self.value_spec, v_shift, v_equalizer),
        )


def _quantize(
    x: torch.Tensor, statistics: tuple[torch.Tensor | None, ...], spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and scales of x (tokens, Hkv, dim)."""
    packed, scales = quantize_op.quantize(x.transpose(0, 1), *statistics, spec.key)
    return packed.transpose(0, 1), scales.transpose(0, 1)
