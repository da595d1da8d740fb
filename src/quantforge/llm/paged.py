"""Packed rows of a cache layer in the pages that fused decode attention reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from quantforge.numerics.packing import row_bytes
from quantforge.numerics.pages import PageLayout
from quantforge.ops.pages import (
    key_pages,
    read_key_pages,
    read_value_pages,
    value_pages,
)
from quantforge.ops.quantize.eager import pack_columns
from quantforge.spec import QuantSpec
from quantforge.tensor import QuantTensor


@dataclass(frozen=True)
class PageFormat:
    """How a store writes pages.

    Attributes:
        layout: of the pages.
        spec: the code.
        holds_keys: keys lie token by token, values channel by channel.
    """

    layout: PageLayout
    spec: QuantSpec
    holds_keys: bool

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of one head."""
        return self.layout.key_bytes if self.holds_keys else self.layout.value_bytes

    def write(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Pack codes (B, Hkv, n, dim) and scales (B, Hkv, n) into (B, pages, Hkv, bytes)."""
        missing = -codes.shape[2] % self.layout.tokens
        codes = torch.nn.functional.pad(codes, (0, 0, 0, missing))
        scales = torch.nn.functional.pad(scales, (0, missing))
        make = key_pages if self.holds_keys else value_pages
        return make(codes, scales, self.layout).transpose(1, 2)

    def read(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Invert `write`."""
        read = read_key_pages if self.holds_keys else read_value_pages
        return read(pages.transpose(1, 2), self.layout)


@dataclass(frozen=True, eq=False)
class PagedRows:
    """Some consecutive tokens of pages.

    Attributes:
        pages: (B, capacity, Hkv, bytes) uint8.
        n: tokens that count.
        format: of the pages.
        shift: (..., 1, dim) or None.
        equalizer: likewise.
        dtype: what the vectors stand for.
        first: the first token that counts; those before it have left a sliding window.
    """

    pages: torch.Tensor
    n: int
    format: PageFormat
    shift: torch.Tensor | None
    equalizer: torch.Tensor | None
    dtype: torch.dtype
    first: int = 0

    @property
    def _used(self) -> slice:
        """The pages that hold the tokens."""
        tokens = self.format.layout.tokens
        return slice(self.first // tokens, -(-(self.first + self.n) // tokens))

    @property
    def nbytes_packed(self) -> int:
        """Bytes of the pages that hold the tokens, and of the statistics."""
        batch, _, heads, width = self.pages.shape
        used = batch * (self._used.stop - self._used.start) * heads * width
        statistics = [t for t in (self.shift, self.equalizer) if t is not None]
        return used + sum(t.numel() * t.element_size() for t in statistics)

    @cached_property
    def rows(self) -> QuantTensor:
        """The same codes as rows: what every operator but decode attention reads."""
        spec, start = self.format.spec, self.first % self.format.layout.tokens
        codes, scales = self.format.read(self.pages[:, self._used])
        codes = codes[:, :, start : start + self.n]
        packed = codes.new_zeros((*codes.shape[:3], row_bytes(spec.dim, spec.bits)))
        pack_columns(codes.flatten(0, 2).T, spec.bits, packed.flatten(0, 2))
        scales = scales[:, :, start : start + self.n, None].contiguous()
        return QuantTensor._make(
            packed,
            scales,
            self.shift,
            self.equalizer,
            (spec.key, spec.dim, self.dtype, 1, False, "torch"),
        )
