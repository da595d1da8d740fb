"""Storage of the keys, or the values, of one layer.

    dense   (B, Hkv, capacity, dim)   [ sinks ][ recent ]  and room for a page
    packed  (B, Hkv, capacity, bytes) pages in the order of their tokens

Dense rows are written in place while they fit. When pages leave the window the dense buffer is
replaced, not compacted: a view handed out in the same step still reads the old one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantforge.errors import InputError
from quantforge.llm.options import CacheConfig
from quantforge.llm.segments import SegmentedTensor
from quantforge.numerics.packing import packed_width
from quantforge.ops.cache_append import op as cache_append_op
from quantforge.ops.measure import measure
from quantforge.spec import QuantSpec
from quantforge.tensor import QuantTensor

GROWTH_PAGES = 8
"""Packed buffers grow by an eighth, at least by this many pages: little slack, few copies."""


class Store:
    """Sinks, packed pages and recent window of keys or of values."""

    def __init__(self, options: CacheConfig, spec: QuantSpec) -> None:
        self.options, self.spec = options, spec
        self.dense: torch.Tensor | None = None
        self.packed: torch.Tensor | None = None
        self.scales: torch.Tensor | None = None
        self.shift: torch.Tensor | None = None
        self.equalizer: torch.Tensor | None = None
        self.n_dense = self.n_packed = 0

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.n_dense + self.n_packed

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, torch.Tensor]:
        names = ("dense", "packed", "scales", "shift", "equalizer")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor t by f(t): a selection along the batch, or a move."""
        with torch.inference_mode(False), torch.no_grad():
            for name, t in self._tensors().items():
                setattr(self, name, f(t))

    def append(self, x: torch.Tensor) -> torch.Tensor | SegmentedTensor:
        """Append x (B, Hkv, q, dim), return all rows, then pack what has left the window.

        The rows returned hold x exactly, also where it is packed by now. `check` comes first.
        """
        dense = self._append_dense(x)
        rows = self._view_of(dense)
        pages = (self._recent - self.options.window) // self.options.page_size
        if pages > 0:
            self._pack(dense, pages * self.options.page_size)
        elif self.dense is None:  # own memory: x may be a slice of a larger projection
            self.dense = self._with_room(dense, self.n_dense)
        return rows

    def check(self, x: torch.Tensor) -> None:
        """Raise `InputError` unless x can be appended."""
        if self.dense is None:
            return
        batch, heads, _, dim = self.dense.shape
        if x.ndim != 4 or (*x.shape[:2], x.shape[3]) != (batch, heads, dim):
            raise InputError(
                f"this cache holds batch {batch}, {heads} heads and dim {dim}, and cannot take "
                f"{tuple(x.shape)}; use a new cache, or cache.reset(), for another batch"
            )

    @property
    def _n_sinks(self) -> int:
        return min(self.options.sinks, self.n_dense)

    @property
    def _recent(self) -> int:
        return self.n_dense - self._n_sinks

    def _append_dense(self, x: torch.Tensor) -> torch.Tensor:
        """Return all dense rows with x behind them, in place where it fits."""
        n = self.n_dense + x.shape[2]
        if self.dense is None:
            self.n_dense = n
            return x
        if n > self.dense.shape[2]:
            self.dense = self._with_room(self.dense[:, :, : self.n_dense], n)
        self.dense[:, :, self.n_dense : n] = x
        self.n_dense = n
        return self.dense[:, :, :n]

    def _with_room(self, rows: torch.Tensor, at_least: int) -> torch.Tensor:
        options = self.options
        capacity = max(at_least, options.sinks + options.window + options.page_size)
        batch, heads, n, dim = rows.shape
        buffer = rows.new_empty((batch, heads, capacity, dim))
        buffer[:, :, :n] = rows
        return buffer

    def _pack(self, dense: torch.Tensor, tokens: int) -> None:
        """Quantize the first tokens behind the sinks and drop them from the dense rows."""
        start, stop = self._n_sinks, self._n_sinks + tokens
        if self.n_packed == 0:
            shift, equalizer = measure(dense[:, :, start:])
            self.shift = shift if self.options.shift else None
            self.equalizer = equalizer if self.options.equalizer else None
        self._reserve(dense, tokens)
        position = torch.tensor(self.n_packed)
        cache_append_op.cache_append(
            self.packed,
            self.scales,
            dense[:, :, start:stop],
            position,
            self.shift,
            self.equalizer,
            self.spec.key,
        )
        self.n_packed += tokens
        self.n_dense -= tokens
        kept = torch.cat([dense[:, :, :start], dense[:, :, stop:]], dim=2)
        self.dense = self._with_room(kept, self.n_dense)

    def _reserve(self, dense: torch.Tensor, tokens: int) -> None:
        """Make room for more packed rows."""
        needed = self.n_packed + tokens
        if self.packed is not None and needed <= self.packed.shape[2]:
            return
        capacity = needed
        if self.packed is not None:
            room = max(self.n_packed // 8, GROWTH_PAGES * self.options.page_size)
            capacity = max(needed, self.n_packed + room)
        lead = (*dense.shape[:2], capacity)
        packed = dense.new_empty((*lead, packed_width(self.spec)), dtype=torch.uint8)
        scale_dtype = getattr(torch, self.spec.scale_dtype)
        scales = dense.new_empty((*lead, self.spec.scales_per_vector), dtype=scale_dtype)
        if self.packed is not None and self.scales is not None:
            packed[:, :, : self.n_packed] = self.packed[:, :, : self.n_packed]
            scales[:, :, : self.n_packed] = self.scales[:, :, : self.n_packed]
        self.packed, self.scales = packed, scales

    def crop(self, tokens: int) -> None:
        """Remove the last tokens: recent ones first, then packed ones, then sinks."""
        recent = min(tokens, self._recent)
        packed = min(tokens - recent, self.n_packed)
        self.n_packed -= packed
        self.n_dense -= tokens - packed

    def view(self) -> torch.Tensor | SegmentedTensor | None:
        """Return all rows held, or None before the first."""
        return None if self.dense is None else self._view_of(self.dense[:, :, : self.n_dense])

    def _view_of(self, dense: torch.Tensor) -> torch.Tensor | SegmentedTensor:
        if self.n_packed == 0:
            return dense
        assert self.packed is not None, "packed rows are counted where they are stored"
        assert self.scales is not None, "packed rows are counted where they are stored"
        packed = QuantTensor._make(
            self.packed[:, :, : self.n_packed],
            self.scales[:, :, : self.n_packed],
            self.shift,
            self.equalizer,
            (self.spec.key, self.spec.dim, dense.dtype, 1, False, "torch"),
        )
        return SegmentedTensor(dense, packed, self._n_sinks)
