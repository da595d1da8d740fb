"""One layer of a quantized cache for sliding-window attention: memory that stays constant.

    packed  [ dead ][ live ........................... ][ room ]
                    first                        n_packed
    dense   [ recent ][ room ]

A window of W tokens leaves W - 1 to keep. Packed tokens die one by one at the front; when enough
are dead the rest moves into a buffer of the same size, which costs a few copied tokens per token.
A window that is hardly longer than the recent one stays dense: packing a page of it would save
nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from quantforge.errors import UnsupportedError
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig
from quantforge.llm.paged import PageFormat
from quantforge.llm.segments import SegmentedTensor
from quantforge.llm.store import Store
from quantforge.spec import QuantSpec


class WindowStore(Store):
    """The latest `keep` tokens of keys or of values; the oldest of them packed.

    Args:
        options: of the cache. There are no sinks: the first tokens leave the window.
        spec: the code.
        pages: the format of pages, or None for rows.
        keep: tokens that the next query can see.

    Attributes:
        shared: whether packed rows are also a fork's, and are copied before they are written: a
            prefix would leave the window anyway.
    """

    def __init__(
        self, options: CacheConfig, spec: QuantSpec, pages: PageFormat | None, keep: int
    ) -> None:
        super().__init__(dataclasses.replace(options, sinks=0), spec, pages)
        self.keep = keep
        self.recording = self.shared = False
        self.first = 0
        self._packs = keep >= options.window + options.page_size
        self._unit = 1 if pages is None else pages.layout.tokens
        least = max(options.page_size, self._unit) if self._packs else 16
        self._slack = max(keep // 8, least)

    @property
    def length(self) -> int:
        """Tokens held that the next query can see."""
        return self.n_dense + self.n_packed - self.first

    @property
    def nbytes(self) -> int:
        """Bytes allocated; dense rows are a view of their buffer."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def share(self) -> list[Any]:
        """Return what copies can hold together with this store until one of them packs."""
        self.shared = True
        return [t for t in (self.packed, self.scales) if t is not None] + self._constants()

    @property
    def due(self) -> int:
        """Tokens that have left the recent window and fill pages."""
        return super().due if self._packs else 0

    def append(self, x: torch.Tensor, pack: bool = True) -> torch.Tensor | SegmentedTensor:
        """Append x (B, Hkv, q, dim); return what its queries can see, x included."""
        is_new = self.dense is None
        dense = self._append_dense(x)
        rows = self._latest(dense, self.keep + x.shape[2])
        if is_new:
            self.dense = dense
        if not self.recording:
            self._forget()
        if is_new and not self.due:  # own memory: x may be a slice of a larger projection
            assert self.dense is not None, "set above"
            self.dense = self._with_room(self.dense[:, :, : self.n_dense], self.n_dense)
        if pack:
            self.pack()
        return rows

    def pack(self, *args: Any, **kwargs: Any) -> None:
        """Quantize the tokens that are due, in the place of dead ones once there are enough."""
        if not self.due:
            return
        if self.first >= self._slack:
            self._reclaim()
        super().pack(*args, **kwargs)
        self.shared = False

    def crop(self, tokens: int) -> None:
        """Remove the last tokens, then forget what the next query cannot see."""
        recent = min(tokens, self.n_dense)
        self.n_dense -= recent
        self._set_packed(self.n_packed - (tokens - recent), self.first)
        self._forget()

    def view(self) -> torch.Tensor | SegmentedTensor | None:
        """Return all rows held, or None before the first."""
        if self.dense is None:
            return None
        return self._latest(self.dense[:, :, : self.n_dense], self.length)

    def _latest(self, dense: torch.Tensor, count: int) -> torch.Tensor | SegmentedTensor:
        """Return the last `count` rows, or as many as there are."""
        skipped = self.first + max(self.length - count, 0)
        if skipped >= self.n_packed:
            return dense[:, :, skipped - self.n_packed :]
        return self._view_of(dense, skipped)

    def _set_packed(self, n: int, first: int) -> None:
        if first == n:
            self.packed, self.scales, n, first = None, None, 0, 0
        self.n_packed, self.n_rows, self.first = n, n, first

    def _forget(self) -> None:
        """Give up all but the tokens to keep."""
        dead = max(self.length - self.keep, 0)
        packed = min(dead, self.n_packed - self.first)
        self._set_packed(self.n_packed, self.first + packed)
        if self.dense is not None and (gone := dead - packed):
            self.dense, self.n_dense = self.dense[:, :, gone:], self.n_dense - gone

    def _with_room(self, rows: torch.Tensor, at_least: int) -> torch.Tensor:
        options = self.options
        usual = options.window + options.page_size if self._packs else self.keep + self._slack
        batch, heads, n, dim = rows.shape
        buffer = rows.new_empty((batch, heads, max(at_least, usual), dim))
        buffer[:, :, :n] = rows
        return buffer

    @property
    def _most(self) -> int:
        """Entries of packed buffers that are always enough between two calls of `_reclaim`."""
        tokens = self.keep + self._slack + self.options.page_size
        return -(-tokens // self._unit) + 1

    def _grown(
        self, buffer: torch.Tensor, dim: int, used: int, needed: int, tokens: int
    ) -> torch.Tensor:
        if self.shared and needed <= buffer.shape[dim]:
            buffer = buffer.clone()
        grown = super()._grown(buffer, dim, used, needed, tokens)
        most = max(needed, self._most)
        return grown if grown.shape[dim] <= most else grown.narrow(dim, 0, most).clone()

    def _reclaim(self) -> None:
        """Move the packed rows that are alive to the front of a new buffer.

        A view of the old one may have been handed out in this step, so it is not written.
        """
        dead = self.first // self._unit
        used = -(-self.n_packed // self._unit) - dead
        capacity = max(used, self._most)
        for name, axis in (("packed", 2 if self.pages is None else 1), ("scales", 2)):
            if (old := getattr(self, name)) is None:
                continue
            shape = list(old.shape)
            shape[axis] = capacity
            new = old.new_empty(shape)
            new.narrow(axis, 0, used).copy_(old.narrow(axis, dead, used))
            setattr(self, name, new)
        gone = dead * self._unit
        self._set_packed(self.n_packed - gone, self.first - gone)


class QuantForgeSlidingLayer(QuantForgeLayer):
    """Keys and values of one sliding-window attention layer: packed pages, recent tokens.

    It returns and keeps as many tokens as transformers' `DynamicSlidingWindowLayer`.

    Args:
        options: how to store them; `sinks` does not apply.
        sliding_window: tokens that a query sees, itself included.
    """

    is_sliding = True

    def __init__(self, options: CacheConfig, sliding_window: int) -> None:
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window)  # read by iteration
        self.record_past = False
        super().__init__(options)

    def _new_store(self, spec: QuantSpec, pages: PageFormat | None) -> Store:
        return WindowStore(self.options, spec, pages, self.sliding_window - 1)

    def activate_past_recording(self) -> None:
        """Keep tokens that have left the window until the next `crop`, which may need them."""
        self.record_past = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens (B, Hkv, q, dim); return those that any of the q queries can see.

        Returns:
            On the first call the arguments; later the last `sliding_window - 1 + q` tokens.

        Raises:
            InputError: as in a layer of full attention.
        """
        for store in self._stores():
            store.recording = self.record_past
        states = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        return states

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Choose the codes for the head dims at hand."""
        super().lazy_initialization(key_states, value_states)
        for store in self._stores():
            store.recording = self.record_past

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, those that have left the window included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the keys that the next update will return."""
        seen, keep = self.cumulative_length, self.sliding_window - 1
        return min(seen, keep) + query_length, max(seen - keep, 0)

    def get_max_length(self) -> int:
        """Return the window: no query sees more tokens."""
        return self.sliding_window

    get_max_cache_shape = get_max_length  # its name in transformers before 5.20

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.cumulative_length = 0

    def _crop(self, tokens: int) -> None:
        left = self.cumulative_length - tokens
        if self._keys.length - tokens < min(left, self.sliding_window - 1):
            raise UnsupportedError(
                f"{tokens} tokens cannot be removed: the window of {self.sliding_window} is full "
                "and what has left it is gone; call cache.activate_past_recording() before the "
                "tokens that may have to be removed"
            )
        super()._crop(tokens)
        self.cumulative_length = left
