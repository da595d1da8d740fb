"""Storage of the keys, or the values, of one layer.

    dense   (B, Hkv, capacity, dim)   [ sinks ][ recent ]  and room for a page
    packed  (B, Hkv, capacity, bytes) rows in the order of their tokens, and scales beside them; or
            (B, capacity, Hkv, bytes) pages (`llm.paged`)
    prefix  packed rows before them that are also a fork's, and are never written (`llm.joined`)

Dense rows are written in place while they fit. When pages leave the window the dense buffer is
replaced, not compacted: a view handed out in the same step still reads the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch

from quantforge.errors import InputError
from quantforge.llm.heads import HeadGroups
from quantforge.llm.importance import Slots
from quantforge.llm.joined import Part, Prefix, Source, cut, join, with_prefix
from quantforge.llm.options import CacheConfig
from quantforge.llm.paged import PagedRows, PageFormat
from quantforge.llm.segments import SegmentedTensor
from quantforge.numerics.packing import packed_width
from quantforge.ops.cache_append import op as cache_append_op
from quantforge.ops.measure import equalizer_of, moments
from quantforge.ops.pages import codes_of
from quantforge.ops.quantize import op as quantize_op
from quantforge.spec import QuantSpec
from quantforge.tensor import QuantTensor

GROWTH_PAGES = 8
"""Packed buffers grow by an eighth, at least by this many page sizes: little slack, few copies.
Those of a tier grow by what it takes of so many tokens."""


class Store:
    """Sinks, packed pages and recent window of keys or of values.

    Args:
        options: settings.
        spec: the code.
        pages: how rows are laid out in pages; None: as rows.

    Attributes:
        n_dense: dense rows that count.
        n_packed: packed tokens, all tiers.
        n_rows: packed rows of this store's own code, those of the prefix included.
        prefix: the first of them, which other stores may hold too.
        tiers: stores of other bits, with packed rows only: for important tokens, or for the heads
            of the second and later groups.
        groups: of heads with bits of their own, or None.
        share_of_tokens: that this store's own code gets.
        slots: where the tokens of tiers are; None without tiers or packed tokens.
        moments: mean, and RMS about it, of the channels when the first page was packed.
        query_rms: RMS of the channels of the queries seen by then, None for values.
    """

    groups: HeadGroups | None = None
    share_of_tokens: float = 1.0

    def __init__(
        self,
        options: CacheConfig,
        spec: QuantSpec,
        pages: PageFormat | None = None,
    ) -> None:
        self.options, self.spec, self.pages = options, spec, pages
        self.dense: torch.Tensor | None = None
        self.packed: torch.Tensor | None = None
        self.scales: torch.Tensor | None = None
        self.shift: torch.Tensor | None = None
        self.equalizer: torch.Tensor | None = None
        self.n_dense = self.n_packed = self.n_rows = 0
        self.moments: tuple[torch.Tensor, torch.Tensor] | None = None
        self.query_rms: torch.Tensor | None = None
        self.tiers: list[Store] = []
        self.slots: Slots | None = None
        self.prefix: tuple[Prefix, ...] = ()

    def add_tier(self, spec: QuantSpec, pages: PageFormat | None) -> None:
        """Give important tokens, or another group of heads, a code of their own."""
        self.tiers.append(Store(self.options, spec, pages))

    @property
    def heads(self) -> int:
        """Key heads."""
        assert self.dense is not None, "a store has its heads from its first rows"
        return self.dense.shape[1]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.n_dense + self.n_packed

    @property
    def _own(self) -> int:
        """Packed rows behind the prefix."""
        return self.n_rows - sum(prefix.n for prefix in self.prefix)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, by this store or for a prefix that it shares."""
        stores = (self, *self.tiers)  # which share statistics
        held = {id(t): t for store in stores for t in store.tensors()}
        return sum(t.numel() * t.element_size() for t in held.values())

    def _tensors(self) -> dict[str, torch.Tensor]:
        names = ("dense", "packed", "scales", "shift", "equalizer")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def tensors(self) -> list[torch.Tensor]:
        """Return all buffers and statistics but those of tiers."""
        shared = [t for prefix in self.prefix for t in (prefix.packed, prefix.scales)]
        return [*self._tensors().values(), *(t for t in shared if t is not None)]

    def share(self) -> list[Any]:
        """Make the packed rows a prefix; return what copies can hold together with this store."""
        if (own := self._own) and self.packed is not None:
            new = Prefix(self.packed, self.scales, own)
            self.prefix = with_prefix(self.prefix, new, self.pages)
            self.packed = self.scales = None
        return [*self.prefix, *self._constants()]

    def _constants(self) -> list[Any]:
        """Return what is replaced and never written."""
        held = (self.shift, self.equalizer, *(self.moments or ()), self.query_rms, self.slots)
        return [x for x in held if x is not None]

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor t by f(t): a selection along the batch, or a move."""
        with torch.inference_mode(False), torch.no_grad():
            for name, t in self._tensors().items():
                setattr(self, name, f(t))
            self.prefix = tuple(prefix.map(f) for prefix in self.prefix)
            for tier in self.tiers:
                tier.map(f)
            self.slots = None if self.slots is None else self.slots.map(f)

    def append(self, x: torch.Tensor, pack: bool = True) -> torch.Tensor | SegmentedTensor:
        """Append x (B, Hkv, q, dim), return all rows, then pack what has left the window.

        The rows returned hold x exactly, also where it is packed by now. `check` comes first.

        Args:
            x: keys or values.
            pack: False leaves it to a later call of `pack`.
        """
        dense = self._append_dense(x)
        rows = self._view_of(dense)
        if self.dense is None:
            # own memory: x may be a slice of a larger projection; packing copies what it keeps
            self.dense = dense if self.due else self._with_room(dense, self.n_dense)
        if pack:
            self.pack()
        return rows

    @property
    def due(self) -> int:
        """Tokens that have left the window and fill pages."""
        size = self.options.page_size
        return max(0, self._recent - self.options.window) // size * size

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

    def candidates(self) -> slice:
        """Return the dense rows that are due."""
        return slice(self._n_sinks, self._n_sinks + self.due)

    def pack(
        self,
        query_rms: torch.Tensor | None = None,
        block: tuple[torch.Tensor, Sequence[int]] | None = None,
        real: torch.Tensor | None = None,
    ) -> None:
        """Quantize the tokens that are due and drop them from the dense rows.

        Args:
            query_rms: RMS of the channels of queries (B, Hkv, 1, dim), where they are known.
            block: tier (B, Hkv, due) of each token and the tokens of each tier; with tiers only.
            real: (B, n_dense) dense rows that are no padding, which is not measured; None for all.
        """
        if not (tokens := self.due):
            return
        assert self.dense is not None, "rows that are due are held"
        rows, dense = self.candidates(), self.dense[:, :, : self.n_dense]
        if self.n_packed == 0:
            real = None if real is None else real[:, None, rows.start :]
            self._measure(dense[:, :, rows.start :], query_rms, real)
        x = dense[:, :, rows]
        if self.groups is not None:
            for group, store in enumerate((self, *self.tiers)):
                store._quantize(self.groups.part(x, group))
        elif block is None:
            self._quantize(x)
        else:
            self._quantize_tiers(x, *block)
        self.n_packed += tokens
        self.n_dense -= tokens
        kept = torch.cat([dense[:, :, : rows.start], dense[:, :, rows.stop :]], dim=2)
        self.dense = self._with_room(kept, self.n_dense)

    def _measure(
        self, x: torch.Tensor, query_rms: torch.Tensor | None, real: torch.Tensor | None
    ) -> None:
        self.moments = moments(x, real)
        self.query_rms = query_rms
        mean, rms = self.moments
        self.shift = mean if self.options.shift else None
        if not self.options.shift:  # the channels are then coded about zero
            rms = (rms.square() + mean.square()).sqrt()
        self.equalizer = equalizer_of(rms, query_rms) if self.options.equalizer else None
        statistics = self.shift, self.equalizer
        for i, store in enumerate((self, *self.tiers)):
            store.shift, store.equalizer = (
                t if t is None or self.groups is None else self.groups.part(t, i)
                for t in statistics
            )

    def _quantize_tiers(self, x: torch.Tensor, tiers: torch.Tensor, counts: Sequence[int]) -> None:
        """Quantize x (B, Hkv, n, dim), each token with the code of its tier."""
        order = tiers.argsort(dim=2, stable=True).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
        parts = x.gather(2, order).split(list(counts), dim=2)
        for store, part in zip((self, *self.tiers), parts, strict=True):
            store._quantize(part)
        empty = Slots(tiers[:, :, :0])
        self.slots = (self.slots or empty).appended(tiers, counts)

    def _quantize(self, x: torch.Tensor) -> None:
        """Quantize x behind the packed rows of this store's code."""
        if x.shape[2] == 0:
            return
        if self.pages is None:
            self._append_rows(x)
        else:
            self._append_pages(x, self.pages)
        self.n_rows += x.shape[2]

    def _append_rows(self, x: torch.Tensor) -> None:
        """Quantize x behind the packed rows."""
        lead = (*x.shape[:2], 0)
        if self.packed is None:
            self.packed = x.new_empty((*lead, packed_width(self.spec)), dtype=torch.uint8)
            scale_dtype = getattr(torch, self.spec.scale_dtype)
            self.scales = x.new_empty((*lead, self.spec.scales_per_vector), dtype=scale_dtype)
        assert self.scales is not None, "rows have their scales beside them"
        own = self._own
        self.packed = self._grown(self.packed, 2, own, own + x.shape[2], 1)
        self.scales = self._grown(self.scales, 2, own, own + x.shape[2], 1)
        position = torch.tensor(own)
        cache_append_op.cache_append(
            self.packed, self.scales, x, position, self.shift, self.equalizer, self.spec.key
        )

    def _append_pages(self, x: torch.Tensor, pages: PageFormat) -> None:
        """Quantize x behind the packed tokens; a page that is not full is written again."""
        tokens, dim = pages.layout.tokens, x.shape[-1]
        packed, scales = quantize_op.quantize(x, self.shift, self.equalizer, self.spec.key)
        codes, scales = codes_of(packed, dim, self.spec.bits), scales[..., 0]
        if self.packed is None:
            shape = (x.shape[0], 0, x.shape[1], pages.page_bytes)
            self.packed = x.new_empty(shape, dtype=torch.uint8)
        full, rest = divmod(self._own, tokens)
        if rest:
            old_codes, old_scales = pages.read(self.packed[:, full : full + 1])
            codes = torch.cat([old_codes[:, :, :rest], codes], 2)
            scales = torch.cat([old_scales[:, :, :rest], scales], 2)
        new = pages.write(codes, scales)
        stop = full + new.shape[1]
        self.packed = self._grown(self.packed, 1, full + (rest > 0), stop, tokens)
        self.packed[:, full:stop] = new

    def _grown(
        self, buffer: torch.Tensor, dim: int, used: int, needed: int, tokens: int
    ) -> torch.Tensor:
        """Return a buffer with room for `needed` entries of some tokens on an axis."""
        if needed <= buffer.shape[dim]:
            return buffer
        least = ceil(GROWTH_PAGES * self.options.page_size * self.share_of_tokens / tokens)
        capacity = max(needed, used + max(used // 8, least)) if buffer.shape[dim] else needed
        shape = list(buffer.shape)
        shape[dim] = capacity
        grown = buffer.new_empty(shape)
        grown.narrow(dim, 0, used).copy_(buffer.narrow(dim, 0, used))
        return grown

    def crop(self, tokens: int) -> None:
        """Remove the last tokens: recent ones first, then packed ones, then sinks."""
        recent = min(tokens, self._recent)
        packed = min(tokens - recent, self.n_packed)
        self.n_packed -= packed
        self.n_dense -= tokens - packed
        if self.slots is None:
            for store in (self, *self.tiers):
                store._cut(self.n_packed)
        else:
            self.slots = self.slots.cropped(packed)
            rows = self.slots.rows or (0,) * (1 + len(self.tiers))
            for store, n in zip((self, *self.tiers), rows, strict=True):
                store._cut(n)
            self.slots = self.slots if self.slots.blocks else None

    def _cut(self, n: int) -> None:
        """Keep the first n packed rows."""
        self.n_rows, self.prefix = n, cut(self.prefix, n)

    def view(self) -> torch.Tensor | SegmentedTensor | None:
        """Return all rows held, or None before the first."""
        return None if self.dense is None else self._view_of(self.dense[:, :, : self.n_dense])

    def _view_of(self, dense: torch.Tensor, first: int = 0) -> torch.Tensor | SegmentedTensor:
        """Return the packed rows from the first one on, and the dense ones."""
        if self.n_packed == first:
            return dense
        sources = [store._source(dense.dtype, first) for store in (self, *self.tiers)]
        assert sources[0] is not None, "every block has ordinary tokens, and every group heads"
        places = self.slots or self.groups
        return SegmentedTensor(dense, sources[0], self._n_sinks, tuple(sources[1:]), places)

    def _source(self, dtype: torch.dtype, first: int = 0) -> Source | None:
        """Return the packed rows of this store's own code, None where there are none."""
        shared = [self._part(p.packed, p.scales, p.n, dtype) for p in self.prefix]
        if self.packed is None or (own := self._own) == first:
            return join(shared)
        return join([*shared, self._part(self.packed, self.scales, own, dtype, first)])

    def _part(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor | None,
        stop: int,
        dtype: torch.dtype,
        first: int = 0,
    ) -> Part:
        if self.pages is not None:
            rest = (self.pages, self.shift, self.equalizer, dtype, first)
            return PagedRows(packed, stop - first, *rest)
        assert scales is not None, "rows have their scales beside them"
        return QuantTensor._make(
            packed[:, :, first:stop],
            scales[:, :, first:stop],
            self.shift,
            self.equalizer,
            (self.spec.key, self.spec.dim, dtype, 1, False, "torch"),
        )
