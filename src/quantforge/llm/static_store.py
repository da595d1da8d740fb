"""Stores of static layers: they pack whole pages, and give what they hold to a window."""

from __future__ import annotations

import torch

from quantforge.llm.options import CacheConfig
from quantforge.llm.paged import PageFormat
from quantforge.llm.sliding import WindowStore
from quantforge.llm.store import Store
from quantforge.spec import QuantSpec


def _whole_pages(n_packed: int, n_recent: int, options: CacheConfig) -> int:
    """Return the rows to pack: those that fill a page which a crop has left in part, and others."""
    size = options.page_size
    kept = n_packed % size
    return max(0, (n_recent - options.window + kept) // size * size - kept)


class WholePages(Store):
    """A store that fills the page which a crop has left in part before it begins another."""

    @property
    def due(self) -> int:
        """Tokens that have left the window and fill pages."""
        return _whole_pages(self.n_packed, self._recent, self.options)


class RingStore(WindowStore):
    """Likewise of a sliding window, for as long as a prompt takes to be packed.

    Args:
        options: of the layer.
        spec: the code.
        pages: the format of pages, or None for rows.
        keep: tokens that the next query can see.

    Attributes:
        gone: tokens before those that are held, which have left the window.
    """

    gone = 0

    def __init__(
        self, options: CacheConfig, spec: QuantSpec, pages: PageFormat | None, keep: int
    ) -> None:
        super().__init__(options, spec, pages, keep)
        self.gone = 0

    @property
    def seen(self) -> int:
        """Tokens held, or seen and gone."""
        return self.gone + self.length

    @property
    def due(self) -> int:
        """Tokens that have left the recent window and fill pages."""
        if not self._packs:
            return 0
        return _whole_pages(self.n_packed, self._recent, self.options)

    def _forget(self) -> None:
        held = self.length
        super()._forget()
        self.gone += held - self.length

    def _reclaim(self) -> None:
        """Leave dead rows where they are, so that pages begin where they began."""


def give_statistics(store: Store, statistics: torch.Tensor) -> None:
    """Let a store know what a window (3, B, Hkv, 1, dim) has measured."""
    shift, equalizer, _ = statistics.clone().unbind(0)
    measured, options = store.n_packed > 0, store.options
    store.shift = shift if measured and options.shift else None
    store.equalizer = equalizer if measured and options.equalizer else None


def keep_statistics(store: Store, statistics: torch.Tensor) -> None:
    """Let a window know what a store has measured."""
    for i, measured in enumerate((store.shift, store.equalizer)):
        if measured is not None:
            statistics[i] = measured
