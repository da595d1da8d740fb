"""One layer of a quantized cache with fixed buffers, whose steps a graph can replay.

A prompt takes the way of `QuantForgeLayer`, whose stores write into the same packed buffers. A few
tokens at a time take `ops.window_append`, which reads and writes lengths on the device: a compiled
step contains no length, so it is compiled once and waits for nothing.

    eager, many tokens     stores: host-side lengths, dense rows of their own until they are packed
    else                   window: device-side lengths; `_held` mirrors them while that is possible
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from quantforge.errors import ConfigError, InputError
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig
from quantforge.llm.paged import PageFormat
from quantforge.llm.static_store import WholePages, give_statistics, keep_statistics
from quantforge.llm.static_view import Meta, StaticTensor
from quantforge.llm.store import Store
from quantforge.ops.window_append import op as window_append_op
from quantforge.ops.window_append.api import DENSE, LOST, PACKED, Window, new_window
from quantforge.spec import QuantSpec, check_int


class QuantForgeStaticLayer(QuantForgeLayer):
    """Keys and values of one attention layer in buffers for `max_cache_len` tokens.

    Args:
        options: settings; tiers of importance and bits of single heads are not for static layers.
        max_cache_len: tokens for which there is room.

    Raises:
        ConfigError: for settings that a static layer cannot have.
    """

    is_compileable = True
    _held: tuple[int, int] | None
    """Packed and dense tokens; None after compiled steps, when only the device knows."""
    _pending: bool
    """Whether the stores hold what the window does not: a prompt whose packing waits."""
    _bound: int
    """Tokens that may be held: an upper limit, so that an overflow is seen without waiting."""
    _before = 0
    """Tokens before those that `_held` counts, which have left a window."""

    def __init__(self, options: CacheConfig, max_cache_len: int) -> None:
        check_int("max_cache_len", max_cache_len, 1, 1 << 30)
        if options.importance or options.head_bits or options.outlier_bits is not None:
            raise ConfigError(
                "a cache with max_cache_len keeps all tokens and heads at the same bits; leave out "
                "importance, budget, head_bits and outlier_bits, or max_cache_len"
            )
        self.max_cache_len = max_cache_len
        super().__init__(options)

    # ---- buffers -----------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate buffers for keys and values like these."""
        with torch.inference_mode(False), torch.no_grad():
            super().lazy_initialization(key_states, value_states)
            options, pages = self._keys.options, self._keys.pages
            self._page = options.page_size
            rows = options.sinks + options.window + self._page
            self._most = min(self._page, options.window + 1)
            tokens = self._packed_room(rows)
            self._window = new_window(
                key_states,
                value_states,
                rows,
                tokens,
                None if pages is None else pages.layout,
                (self._keys.spec, self._values.spec),
            )
        self.capacity = rows + tokens
        self._batch = key_states.shape[0]
        self._pending, self._held, self._bound = False, (0, 0), 0
        self._adopt(self._window)

    def _packed_room(self, rows: int) -> int:
        """Return the packed tokens for which there must be room behind so many dense rows."""
        # one page more: after a crop a row of tokens may not fill its pages
        return (-(-max(0, self.max_cache_len - rows) // self._page) + 1) * self._page

    def _new_store(self, spec: QuantSpec, pages: PageFormat | None) -> Store:
        page = self.options.page_size if pages is None else pages.layout.tokens
        return WholePages(dataclasses.replace(self.options, page_size=page), spec, pages)

    def _adopt(self, window: Window) -> None:
        """Make buffers those of the layer; graphs may count on their addresses."""
        self._window = window
        self._lend()
        for t in window:
            torch._dynamo.mark_static_address(t)

    def _lend(self) -> None:
        """Let the stores write into the packed buffers."""
        w = self._window
        for store, packed, scales in (
            (self._keys, w.k_packed, w.k_scales),
            (self._values, w.v_packed, w.v_scales),
        ):
            store.packed = packed
            store.scales = None if store.pages is not None else scales

    @property
    def nbytes(self) -> int:
        """Bytes allocated: all buffers, and the dense rows of a prompt that waits to be packed."""
        if not self.is_initialized:
            return 0
        waiting = [s.dense for s in (self._keys, self._values) if s.dense is not None]
        return sum(t.numel() * t.element_size() for t in (*self._window, *waiting))

    # ---- appending ---------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens (B, Hkv, q, dim) and return all keys and values to attend to.

        Returns:
            As `QuantForgeLayer.update` for a prompt, or for more tokens than fit into the window;
            two `StaticTensor`s for a few tokens, and in a graph always.

        Raises:
            InputError: if keys and values do not fit each other or what the layer holds, or if the
                layer is full. A graph cannot raise: there `get_mask_sizes` does, which transformers
                calls before each step, and tokens without room are left out and reported later.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.compiler.is_compiling():
            if self._pending:
                self._settle_eagerly()
            self._held = None
            return self._append(key_states, value_states)
        if self._pending:
            self._settle()
        if self.get_seq_length() == 0 and key_states.shape[0] != self._batch:
            self.lazy_initialization(key_states, value_states)
        held, q = self._lengths(), key_states.shape[2]
        self._check_room(self._before + sum(held), q)
        rows, kept = self._window.k_dense.shape[2], held[0] % self._page
        # a cache loaded from one of other pages may hold more beside a page in part
        crowded = held[1] + q > rows + self._page - kept
        if q > self._most or crowded or (q > 1 and sum(held) == 0):
            return self._extend(key_states, value_states, args, kwargs)
        with torch.inference_mode(False), torch.no_grad():
            views = self._append(key_states, value_states)
        # what the operator does, which the host cannot see
        moved = self._page - kept if held[1] + q > rows - kept else 0
        self._held = (held[0] + moved, held[1] + q - moved)
        return views

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append on the device, in pieces that fit."""
        options = self._keys.options
        for k, v in zip(key.split(self._most, 2), value.split(self._most, 2), strict=True):
            window_append_op.window_append(
                *self._window,
                *(k.to(self.dtype), v.to(self.dtype)),
                *(options.sinks, self._page, options.shift, options.equalizer),
                *(self._keys.spec.key, self._values.spec.key),
            )
        return self._views()

    def _extend(
        self, key: torch.Tensor, value: torch.Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append by the stores; packing may wait for the attention of these tokens."""
        with torch.inference_mode(False), torch.no_grad():
            self._load()
        self._pending = True
        keys, values = super().update(key, value, *args, **kwargs)
        if not self._keys.due:
            self._settle()
        return keys, values

    def _views(self) -> tuple[StaticTensor, StaticTensor]:
        return self._views_of(self._window)

    def _views_of(self, w: Window) -> tuple[StaticTensor, StaticTensor]:
        k_meta, v_meta = self._meta(self._keys.spec), self._meta(self._values.spec)
        k = StaticTensor(w.k_dense, w.k_packed, w.k_scales, w.k_statistics, w.counts, k_meta)
        v = StaticTensor(w.v_dense, w.v_packed, w.v_scales, w.v_statistics, w.counts, v_meta)
        return k, v

    def _meta(self, spec: QuantSpec) -> Meta:
        options = self._keys.options
        of_codes = (spec.key, options.sinks, self._page, options.shift, options.equalizer)
        return Meta(*of_codes, *self._sight())  # torch.compile cannot follow _replace before 2.13

    def _sight(self) -> tuple[int, int]:
        """Return the window and the columns of a ring."""
        return 0, 0

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """All keys (B, Hkv, capacity, dim), or None before the first token."""
        self._settle()
        return self._views()[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """All values (B, Hkv, capacity, dim), or None before the first token."""
        self._settle()
        return self._views()[1] if self.is_initialized else None

    # ---- between the stores and the window -------------------------------------------------------

    def _load(self) -> None:
        """Let the stores hold what the window does. Packed rows are the same memory."""
        n_packed, n_dense = self._lengths()
        w = self._window
        for store, dense, statistics in (
            (self._keys, w.k_dense, w.k_statistics),
            (self._values, w.v_dense, w.v_statistics),
        ):
            store.n_packed = store.n_rows = n_packed
            store.n_dense = n_dense
            store.dense = dense[:, :, :n_dense].clone() if n_dense else None
            give_statistics(store, statistics)

    def _store_back(self) -> None:
        """Let the window hold what the stores do."""
        w = self._window
        for store, dense, statistics in (
            (self._keys, w.k_dense, w.k_statistics),
            (self._values, w.v_dense, w.v_statistics),
        ):
            if store.dense is not None:
                dense[:, :, : store.n_dense] = store.dense[:, :, : store.n_dense]
            keep_statistics(store, statistics)
            store.dense = None
        self._tell_queries()
        self._pending = False
        self._set_lengths(self._keys.n_packed, self._keys.n_dense)
        self._adopt(w)  # a copy of the layer has new addresses

    def _tell_queries(self) -> None:
        """Let the window know the queries seen so far: its first page may be packed in a graph."""
        if (rms := self._queries.rms) is not None:
            self._window.k_statistics[2] = rms

    def _settle(self) -> None:
        if not (self.is_initialized and self._pending):
            return
        super()._settle()
        with torch.inference_mode(False), torch.no_grad():
            self._store_back()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle_eagerly(self) -> None:
        self._settle()

    def _see(
        self, query: torch.Tensor, scale: float | None, mask: torch.Tensor | None = None
    ) -> None:
        if self._pending:
            super()._see(query, scale, mask)
            self._settle()
        elif self._held is not None and not self._held[0]:  # for a page that a later chunk fills
            heads = self._window.k_dense.shape[1]
            with torch.inference_mode(False), torch.no_grad():
                self._queries.see(query, heads, self._new_tokens, scale)
                self._tell_queries()

    def _stores(self) -> tuple[Any, ...]:
        self._settle()
        if not self.is_initialized:
            return ()
        with torch.inference_mode(False), torch.no_grad():
            self._load()
        return self._keys, self._values

    # ---- lengths -----------------------------------------------------------------------------

    def _lengths(self) -> tuple[int, int]:
        """Return packed and dense tokens; waits for the device after compiled steps.

        Raises:
            InputError: if a compiled step had tokens for which there was no room.
        """
        if self._held is None:
            counts = self._window.counts[:, 0].tolist() if self._batch else [0] * 4
            if counts[LOST]:
                raise InputError(
                    f"{counts[LOST]} tokens did not fit into a cache of max_cache_len="
                    f"{self.max_cache_len}; use a greater one, or reset() it"
                )
            self._held = (counts[PACKED], counts[DENSE])
        self._bound = self._before + sum(self._held)
        return self._held

    def _set_lengths(self, n_packed: int, n_dense: int) -> None:
        counts = self._window.counts
        counts[PACKED].fill_(n_packed)
        counts[DENSE].fill_(n_dense)
        counts[LOST:].zero_()
        self._held, self._bound = (n_packed, n_dense), self._before + n_packed + n_dense

    def _check_room(self, length: int, q: int) -> None:
        if length + q > self.max_cache_len:
            raise InputError(
                f"this cache has room for max_cache_len={self.max_cache_len} tokens and holds "
                f"{length}: {q} more do not fit; use a greater one, or reset() it"
            )

    def get_seq_length(self) -> int:
        """Return the number of tokens held: a tensor in graphs, and while only the device knows."""
        if not self.is_initialized:
            return 0
        if torch.compiler.is_compiling() or (self._held is None and not self._pending):
            if self._pending:
                self._settle_eagerly()
            return self._counted().long()  # type: ignore[return-value]
        return self._keys.length if self._pending else self._before + sum(self._lengths())

    def _counted(self) -> torch.Tensor:
        """Return the number of tokens, as the device knows it."""
        return self._window.counts[PACKED, 0] + self._window.counts[DENSE, 0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the keys that the next update will return.

        Raises:
            InputError: if the next tokens do not fit.
        """
        if torch.compiler.is_compiling():
            return (self.capacity if self.is_initialized else query_length), 0
        if not self.is_initialized:
            return query_length, 0
        if self._pending or self._held is not None or query_length > self._most:
            self._settle()
            length = self._before + sum(self._lengths())
            self._check_room(length, query_length)
            if length == 0 or query_length > self._most:
                return self._sizes_in_order(length, query_length)
        self._bound += query_length  # compiled steps may have appended as much
        if self._bound > self.max_cache_len:
            self._check_room(self._before + sum(self._lengths()), query_length)
        return self.capacity, 0

    def _sizes_in_order(self, length: int, query_length: int) -> tuple[int, int]:
        """Return the mask sizes of an update that takes the way of a prompt."""
        return length + query_length, 0

    def get_max_length(self) -> int:
        """Return the number of tokens for which there is room."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length

    # ---- the rest of the protocol ---------------------------------------------------------------

    def reset(self) -> None:
        """Forget all tokens; buffers stay where they are."""
        if not self.is_initialized:
            return
        self._pending = False
        self._queries = type(self._queries)()
        with torch.inference_mode(False), torch.no_grad():
            self._window.k_statistics[2].zero_()
            self._set_lengths(0, 0)
            self._load()

    def _crop(self, tokens: int) -> None:
        """Remove tokens: recent ones first, then packed ones, then sinks. Codes stay."""
        self._settle()
        n_packed, n_dense = self._lengths()
        recent = min(tokens, n_dense - min(self.options.sinks, n_dense))
        packed = min(tokens - recent, n_packed)
        with torch.inference_mode(False), torch.no_grad():
            self._set_lengths(n_packed - packed, n_dense - (tokens - packed))

    def _map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every buffer t by f(t), in place where the shape and the device stay."""
        self._settle()
        if not self.is_initialized:
            return
        with torch.inference_mode(False), torch.no_grad():
            parts = []
            for name, t in zip(Window._fields, self._window, strict=True):
                if t.ndim == 1:  # scales of pages, which are none
                    parts.append(t.to(f(self._window.counts.T).device))
                    continue
                axis = 1 if name.endswith(("statistics", "counts")) else 0
                new = f(t.movedim(axis, 0)).movedim(0, axis)
                same = new.shape == t.shape and new.device == t.device
                parts.append(t.copy_(new) if same else new.contiguous())
            self._batch = parts[0].shape[0]
            self._adopt(Window(*parts))
            self._queries.map(f)
