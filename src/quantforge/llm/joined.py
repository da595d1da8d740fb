"""Packed rows of one code in several buffers: of prefixes shared with other caches, and one's own.

    prefix    [ ................ ]   never written again, held by every fork
    prefix    [ ...... ]             what a fork had packed when it was forked itself
    own       [ .... ][ room ]

Attention runs over each of them and merges by the log-sum-exp: nothing is copied to be joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from quantforge.llm.paged import PagedRows, PageFormat
from quantforge.tensor import QuantTensor

Part = QuantTensor | PagedRows
"""Packed rows of one code in one buffer."""


def count(part: Part) -> int:
    """Return the tokens of a part."""
    return part.n if isinstance(part, PagedRows) else part._packed.shape[-2]


@dataclass(frozen=True, eq=False)
class JoinedRows:
    """Parts that follow each other in the text, with the same code and statistics.

    Attributes:
        parts: two or more.
    """

    parts: tuple[Part, ...]

    @property
    def nbytes_packed(self) -> int:
        """Bytes of the rows, and once of the statistics."""
        first, *others = self.parts
        statistics = [t for t in _statistics(first) if t is not None]
        twice = len(others) * sum(t.numel() * t.element_size() for t in statistics)
        return sum(part.nbytes_packed for part in self.parts) - twice

    @cached_property
    def rows(self) -> QuantTensor:
        """The same codes copied into one buffer."""
        parts = [part.rows if isinstance(part, PagedRows) else part for part in self.parts]
        first = parts[0]
        return QuantTensor._make(
            torch.cat([part._packed for part in parts], -2),
            torch.cat([part._scales for part in parts], -2),
            first._shift,
            first._equalizer,
            (first._spec_key, first.spec.dim, first.dtype, 1, False, "torch"),
        )


def _statistics(part: Part) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return part.shift, part.equalizer


Source = Part | JoinedRows
"""Packed rows of one code."""


def join(parts: Sequence[Part]) -> Source | None:
    """Return parts as one source, None without any."""
    if len(parts) > 1:
        return JoinedRows(tuple(parts))
    return parts[0] if parts else None


def parts_of(source: Source) -> tuple[Part, ...]:
    """Return the parts of a source, in the order of the text."""
    return source.parts if isinstance(source, JoinedRows) else (source,)


def rows_of(source: Source) -> QuantTensor:
    """Return a source as rows in one buffer."""
    return source if isinstance(source, QuantTensor) else source.rows


@dataclass(frozen=True, eq=False)
class Prefix:
    """Packed rows that are never written again, so that any number of stores can hold them.

    Attributes:
        packed: as in a store, rows or pages.
        scales: (B, Hkv, capacity, scales) of rows; None for pages, which hold them.
        n: rows that count.
    """

    packed: torch.Tensor
    scales: torch.Tensor | None
    n: int

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> Prefix:
        """Return the prefix with f applied to its tensors."""
        return Prefix(f(self.packed), None if self.scales is None else f(self.scales), self.n)


def with_prefix(
    held: tuple[Prefix, ...], new: Prefix, pages: PageFormat | None
) -> tuple[Prefix, ...]:
    """Return prefixes with one more behind them.

    Those that are not longer than the new one become one with it, copied: as in a binary counter,
    a cache that is forked and continued over and over has few parts. A prefix is never copied for
    fewer rows than it has itself.
    """
    merged = [new]
    while held and held[-1].n <= sum(prefix.n for prefix in merged):
        merged.insert(0, held[-1])
        held = held[:-1]
    if len(merged) == 1:
        return (*held, new)
    return (*held, _rows(merged) if pages is None else _pages(merged, pages))


def cut(held: tuple[Prefix, ...], n: int) -> tuple[Prefix, ...]:
    """Return the first n rows of prefixes, or all of them if there are fewer."""
    kept = []
    for prefix in held:
        if n > 0:
            kept.append(prefix if prefix.n <= n else replace(prefix, n=n))
        n -= prefix.n
    return tuple(kept)


def _rows(prefixes: Sequence[Prefix]) -> Prefix:
    packed = torch.cat([p.packed[:, :, : p.n] for p in prefixes], 2)
    scales = torch.cat([p.scales[:, :, : p.n] for p in prefixes if p.scales is not None], 2)
    return Prefix(packed, scales, packed.shape[2])


def _pages(prefixes: Sequence[Prefix], pages: PageFormat) -> Prefix:
    tokens, n = pages.layout.tokens, sum(p.n for p in prefixes)
    used = [p.packed[:, : -(-p.n // tokens)] for p in prefixes]
    if not any(p.n % tokens for p in prefixes[:-1]):
        return Prefix(torch.cat(used, 1), None, n)
    read = [pages.read(t) for t in used]  # a page in the middle is not full
    codes = torch.cat([c[:, :, : p.n] for (c, _), p in zip(read, prefixes, strict=True)], 2)
    scales = torch.cat([s[:, :, : p.n] for (_, s), p in zip(read, prefixes, strict=True)], 2)
    return Prefix(pages.write(codes, scales).contiguous(), None, n)
