"""One layer of a quantized cache with fixed buffers for sliding-window attention.

What has left the recent window is packed into a ring of pages (`llm.ring`), so memory does not
depend on `max_cache_len`. Masks do: their columns are all positions, since a graph must not know
how far the window has moved.

    eager, many tokens     stores in the order of the text; then a ring that begins at page 0 again
    a graph, many tokens   attention to a copy of the ring, then the tokens enter it page by page
    else                   as in any static layer
"""

from __future__ import annotations

import dataclasses

import torch

from quantforge.errors import InputError, UnsupportedError
from quantforge.llm.options import CacheConfig
from quantforge.llm.paged import PageFormat
from quantforge.llm.ring import BEFORE, LAPS, ring_tokens, slots_of, turn
from quantforge.llm.static import QuantForgeStaticLayer
from quantforge.llm.static_store import RingStore, give_statistics, keep_statistics
from quantforge.llm.static_view import StaticTensor
from quantforge.numerics.pages import PageLayout
from quantforge.ops.window_append.api import DENSE, PACKED, Window
from quantforge.spec import QuantSpec, check_int

DENSE_PAGE = 16
"""Tokens by which the rows of a layer move up that keeps its whole window dense."""


class QuantForgeStaticSlidingLayer(QuantForgeStaticLayer):
    """Keys and values of one sliding-window or chunked attention layer in fixed buffers.

    A window that is hardly longer than the recent one stays dense, as in `QuantForgeSlidingLayer`.

    Args:
        options: settings; `sinks` does not apply.
        max_cache_len: tokens that may be seen.
        sliding_window: tokens that a query sees, itself included.

    Raises:
        ConfigError: for settings that a static layer cannot have.
    """

    is_sliding = True
    _keys: RingStore
    _values: RingStore
    _stays_dense: bool

    def __init__(self, options: CacheConfig, max_cache_len: int, sliding_window: int) -> None:
        check_int("sliding_window", sliding_window, 1, 1 << 30)
        self.sliding_window = sliding_window
        self.record_past = False
        super().__init__(options, max_cache_len)

    def activate_past_recording(self) -> None:
        """Keep tokens that have left the window until the next `crop`, which may need them."""
        self.record_past = True

    # ---- buffers -----------------------------------------------------------------------------

    def _page_layout(self, key: QuantSpec, value: QuantSpec) -> PageLayout | None:
        layout, options = super()._page_layout(key, value), self.options
        page = options.page_size if layout is None else layout.tokens
        self._stays_dense = self.sliding_window - 1 < options.window + page
        return None if self._stays_dense else layout

    def _new_store(self, spec: QuantSpec, pages: PageFormat | None) -> RingStore:
        options, keep = self.options, self.sliding_window - 1
        if self._stays_dense:  # its pages are seen by nobody
            options = dataclasses.replace(options, window=keep + DENSE_PAGE, page_size=DENSE_PAGE)
        elif pages is not None:
            options = dataclasses.replace(options, page_size=pages.layout.tokens)
        return RingStore(options, spec, pages, keep)

    def _packed_room(self, rows: int) -> int:
        tokens = ring_tokens(self.sliding_window, self._keys.options.window, self._page)
        return max(2 * self._page, min(tokens, super()._packed_room(rows)))

    def _adopt(self, window: Window) -> None:
        if len(window.counts) <= BEFORE:
            more = window.counts.new_zeros((BEFORE + 1 - len(window.counts), self._batch))
            window = window._replace(counts=torch.cat([window.counts, more]))
        self.capacity = self.max_cache_len
        super()._adopt(window)

    def _lend(self) -> None:
        """Nothing: stores hold rows in the order of the text, and a ring does not."""

    @property
    def _tokens(self) -> int:
        """Slots of the ring."""
        packed = self._window.k_packed
        return packed.shape[2] if self._keys.pages is None else packed.shape[1] * self._page

    def _sight(self) -> tuple[int, int]:
        return self.sliding_window, self.max_cache_len

    # ---- appending ---------------------------------------------------------------------------

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = zip(key.split(self._most, 2), value.split(self._most, 2), strict=True)
        views = self._with(key, value) if key.shape[2] > self._most else None
        for k, v in parts:
            turn(self._window.counts, self._tokens, self._page)
            last = super()._append(k, v)
        return last if views is None else views

    def _with(self, key: torch.Tensor, value: torch.Tensor) -> tuple[StaticTensor, StaticTensor]:
        """Return what is held, copied, and tokens behind it: their first may see what they move."""
        w, n = self._window, key.shape[2]
        counts, packed = w.counts.clone(), {}
        index = counts[DENSE, 0].long() + torch.arange(n, device=key.device)
        for name, new in (("k_dense", key), ("v_dense", value)):
            old = getattr(w, name)
            room = old.new_zeros((*old.shape[:2], n, old.shape[3]))
            packed[name] = torch.cat([old, room], 2).index_copy(2, index, new.to(old.dtype))
        for name in ("k_packed", "v_packed", "k_scales", "v_scales"):
            packed[name] = getattr(w, name).clone()
        packed |= {name: getattr(w, name).clone() for name in ("k_statistics", "v_statistics")}
        counts[DENSE].add_(n)
        return self._views_of(w._replace(**packed, counts=counts))

    # ---- between the stores and the window -------------------------------------------------------

    def _load(self, everything: bool = False) -> None:
        """Let the stores hold what the window does, in the order of the text.

        everything: also tokens that have left the window and are not overwritten.
        """
        (n_packed, n_dense), w = self._lengths(), self._window
        pages = self._tokens // self._page
        last = -(-n_packed // self._page)
        first = last - (pages - 1) if last > pages else 0  # the others are overwritten
        first = last if self._stays_dense else first
        slots = torch.tensor(slots_of(first, last, pages), device=w.counts.device)
        held = 0 if first == last else n_packed - first * self._page
        for store, dense, packed, scales, statistics in (
            (self._keys, w.k_dense, w.k_packed, w.k_scales, w.k_statistics),
            (self._values, w.v_dense, w.v_packed, w.v_scales, w.v_statistics),
        ):
            store.n_packed = store.n_rows = held
            store.first, store.n_dense = 0, n_dense
            store.gone = self._before + n_packed - held
            store.recording = self.record_past
            store.dense = dense[:, :, :n_dense].clone() if n_dense else None
            store.packed = store.scales = None
            if held and store.pages is not None:
                store.packed = packed.index_select(1, slots)
            elif held:
                store.packed, store.scales = (self._selected(t, slots) for t in (packed, scales))
            give_statistics(store, statistics)
            if not (self.record_past or everything):
                store._forget()

    def _selected(self, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return rows (B, Hkv, tokens, bytes) of pages, in their order."""
        return rows.unflatten(2, (-1, self._page)).index_select(2, slots).flatten(2, 3)

    def _store_back(self) -> None:
        """Let the window hold what the stores do, in a ring that begins at page 0."""
        w, keys = self._window, self._keys
        rows, page, room = w.k_dense.shape[2], self._page, self._tokens
        n_dense = min(keys.n_dense, rows)
        # whole pages: those of which nothing is seen, and of recorded ones what has no room
        start = max(keys.first // page, -(-(keys.n_packed - room) // page)) * page
        n_packed = keys.n_packed - start if n_dense == keys.n_dense else 0
        for store, dense, packed, scales, statistics in (
            (self._keys, w.k_dense, w.k_packed, w.k_scales, w.k_statistics),
            (self._values, w.v_dense, w.v_packed, w.v_scales, w.v_statistics),
        ):
            keep_statistics(store, statistics)
            if store.dense is not None:
                kept = store.dense[:, :, store.n_dense - n_dense : store.n_dense]
                dense[:, :, :n_dense] = kept
            if not n_packed:
                continue
            assert store.packed is not None, "it has packed rows"
            if store.pages is not None:
                used = store.packed[:, start // page : -(-store.n_packed // page)]
                packed[:, : used.shape[1]] = used
            else:
                assert store.scales is not None, "rows have their scales beside them"
                packed[:, :, :n_packed] = store.packed[:, :, start : store.n_packed]
                scales[:, :, :n_packed] = store.scales[:, :, start : store.n_packed]
        self._before = keys.seen - n_dense - n_packed
        for store in (self._keys, self._values):
            store.dense = store.packed = store.scales = None
        self._tell_queries()
        self._pending = False
        self._set_lengths(n_packed, n_dense)
        self._adopt(w)

    # ---- lengths -----------------------------------------------------------------------------

    def _lengths(self) -> tuple[int, int]:
        """Return packed tokens, turns included, and dense ones; the first are after `_before`.

        Raises:
            InputError: if compiled steps had more tokens than masks have columns.
        """
        if self._held is None and self._batch:
            counts = self._window.counts[:, 0].tolist()
            packed, dense = counts[PACKED] + counts[LAPS], counts[DENSE]
            seen = self._before + packed + dense
            if seen > self.max_cache_len:
                raise InputError(
                    f"{seen - self.max_cache_len} tokens did not fit into a cache of max_cache_len="
                    f"{self.max_cache_len}; use a greater one, or reset() it"
                )
            self._held = packed, dense
        return super()._lengths()

    def _set_lengths(self, n_packed: int, n_dense: int) -> None:
        super()._set_lengths(n_packed, n_dense)
        self._window.counts[BEFORE].fill_(self._before)

    def get_seq_length(self) -> int:
        """Return the number of tokens seen: a tensor in graphs, and while only the device knows."""
        if self.is_initialized and self._pending and not torch.compiler.is_compiling():
            return self._keys.seen
        return super().get_seq_length()

    def _counted(self) -> torch.Tensor:
        counts = self._window.counts
        return super()._counted() + counts[LAPS, 0] + counts[BEFORE, 0]

    def _sizes_in_order(self, length: int, query_length: int) -> tuple[int, int]:
        keep = self.sliding_window - 1
        return min(length, keep) + query_length, max(length - keep, 0)

    def get_max_length(self) -> int:
        """Return the tokens that a query can see, as transformers' static sliding layer does."""
        return min(self.sliding_window, self.max_cache_len)

    get_max_cache_shape = get_max_length  # its name in transformers before 5.20

    # ---- the rest of the protocol ---------------------------------------------------------------

    def reset(self) -> None:
        """Forget all tokens; buffers stay where they are."""
        self._before = 0
        super().reset()

    def _crop(self, tokens: int) -> None:
        """Remove tokens, if what the rest can see has not been overwritten."""
        self._settle()
        with torch.inference_mode(False), torch.no_grad():
            self._load(everything=True)
            keys, keep = self._keys, self.sliding_window - 1
            if keys.length - tokens < min(keys.seen - tokens, keep):
                raise UnsupportedError(
                    f"{tokens} tokens cannot be removed: the window of {self.sliding_window} is "
                    "full and what has left it is gone; call cache.activate_past_recording() "
                    "before the tokens that may have to be removed, a page of them at most"
                )
            for store in (self._keys, self._values):
                store.crop(tokens)
            self._store_back()
