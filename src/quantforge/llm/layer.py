"""One layer of a quantized cache that grows with its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from quantforge.errors import ConfigError, InputError
from quantforge.llm.heads import HeadGroups
from quantforge.llm.importance import choose
from quantforge.llm.observe import RECENT, Queries, WatchedTensor
from quantforge.llm.options import Bits, CacheConfig
from quantforge.llm.outliers import loud_heads
from quantforge.llm.paged import PageFormat
from quantforge.llm.segments import SegmentedTensor
from quantforge.llm.store import Store
from quantforge.numerics.pages import PageLayout, page_layout, why_no_pages
from quantforge.ops.decode_attention.api import why_not_fused
from quantforge.spec import QuantSpec


@lru_cache
def crop_takes_lengths() -> bool:
    """Return whether this transformers lets a positive number mean the length to keep."""
    layer, token = DynamicLayer(), torch.zeros(1, 1, 2, 1)
    layer.update(token, token)
    try:
        layer.crop(1)
    except ValueError:
        return False
    return True


class QuantForgeLayer(CacheLayerMixin):
    """Keys and values of one attention layer: sinks, packed pages, recent window.

    A token is quantized once, when its page leaves the recent window, and never again. The first
    `update` returns keys and values as they came, so a prompt attends exactly.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = True
    _keys: Any
    _values: Any

    def __init__(self, options: CacheConfig) -> None:
        # CacheLayerMixin.__init__ would assign keys and values, which are properties here
        self.options = self.given = options
        self.is_initialized = False
        self.reset()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Choose the codes for the head dims at hand."""
        options = self.options
        self.dtype, self.device = key_states.dtype, key_states.device
        key, value = (
            options.key_spec(key_states.shape[-1]),
            options.value_spec(value_states.shape[-1]),
        )
        key_pages, value_pages = self._page_formats(key, value)
        self._keys = self._new_store(key, key_pages)
        self._values = self._new_store(value, value_pages)
        self._shares: tuple[float, ...] = ()
        if not self.is_sliding:  # whose packed rows leave by age
            self._add_tiers(key.dim, value.dim)
            self._divide_heads(key_states.shape[1])
        self._queries = Queries(RECENT if self._shares else 0)
        self.is_initialized = True

    def _fits(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Return whether codes were chosen, early ones for dims that turned out right."""
        if not self.is_initialized or self.get_seq_length():
            return self.is_initialized
        dims = (self._keys.spec.dim, self._values.spec.dim)
        return dims == (key_states.shape[-1], value_states.shape[-1])

    def _new_store(self, spec: QuantSpec, pages: PageFormat | None) -> Store:
        return Store(self.options, spec, pages)

    def _add_tiers(self, key_dim: int, value_dim: int) -> None:
        """Give the stores the codes of important tokens."""
        options = self.options
        self._shares = options.shares(key_dim, value_dim)
        for tier in range(1, len(options.tiers)):
            self._add_code(options.key_spec(key_dim, tier), options.value_spec(value_dim, tier))
        for store in (self._keys, self._values):
            for tier, share in zip(store.tiers, self._shares, strict=True):
                tier.share_of_tokens = share

    def _divide_heads(self, kv_heads: int) -> None:
        """Give heads of other bits stores of their own."""
        groups = HeadGroups.of(self.options, kv_heads)
        if groups is None:
            return
        stores = self._keys, self._values
        pairs = [
            tuple(self.options.code(s.spec, bits) for s, bits in zip(stores, group, strict=True))
            for group in groups.bits
        ]
        for store, spec, pages in zip(stores, pairs[0], self._page_formats(*pairs[0]), strict=True):
            store.groups, store.spec, store.pages = groups, spec, pages
        for pair in pairs[1:]:
            self._add_code(*pair)

    def _add_code(self, key: QuantSpec, value: QuantSpec) -> None:
        """Give the stores a further code; it lies in pages where it can."""
        key_pages, value_pages = self._page_formats(key, value)
        self._keys.add_tier(key, key_pages)
        self._values.add_tier(value, value_pages)

    def _page_formats(
        self, key: QuantSpec, value: QuantSpec
    ) -> tuple[PageFormat, PageFormat] | tuple[None, None]:
        """Return the formats of pages of keys and values, or twice None to keep rows."""
        layout = self._page_layout(key, value)
        if layout is None:
            return None, None
        return PageFormat(layout, key, True), PageFormat(layout, value, False)

    def _page_layout(self, key: QuantSpec, value: QuantSpec) -> PageLayout | None:
        """Return the layout of pages, or None to keep rows."""
        if self.options.layout == "rows":
            return None
        if self.options.layout == "pages":
            if (reason := why_no_pages(key, value)) is not None:
                if self.options.importance or self.options.head_bits:  # of some codes only
                    return None
                raise ConfigError(f'layout="pages": {reason}; use layout="auto"')
            return page_layout(key, value)
        fused = why_not_fused(key, value, self.device, self.dtype) is None
        return page_layout(key, value) if fused else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens (B, Hkv, q, dim) and return all keys and values to attend to.

        Returns:
            On the first call the arguments; later two `SegmentedTensor`s (dense tensors while
            nothing is packed) that include the new tokens exactly.

        Raises:
            InputError: if keys and values do not fit each other or what the layer holds; the
                layer is then unchanged.
        """
        if key_states.ndim != 4 or key_states.shape[:3] != value_states.shape[:3]:
            raise InputError(
                "keys and values must be (batch, heads, tokens, dim), alike but for dim; got "
                f"{tuple(key_states.shape)} and {tuple(value_states.shape)}"
            )
        if not self._fits(key_states, value_states):
            self.lazy_initialization(key_states, value_states)
        if self.device != key_states.device:  # the layers of a model may have been moved
            self.to(key_states.device)
        self._keys.check(key_states)  # both before either is appended
        self._values.check(value_states)
        first = self.get_seq_length() == 0
        # buffers outlive this call: tensors made in inference mode could not be updated outside
        with torch.inference_mode(False), torch.no_grad():
            self._pack()  # what the attention of the last update would have packed
            waits = self._waits
            keys = self._keys.append(key_states, pack=not waits)
            values = self._values.append(value_states, pack=not waits)
        if first:
            keys, values = key_states, value_states
        if waits:
            self._new_tokens = key_states.shape[2]
            if isinstance(keys, SegmentedTensor):
                keys._see = self._see
            else:
                keys = WatchedTensor.of(keys, self._see)
        return keys, values

    @property
    def _waits(self) -> bool:
        """Whether packing waits for the queries of an update: they decide how, or what, to pack."""
        looks = self.options.equalizer or self.options.outlier_bits is not None
        measures = looks and self._keys.n_packed == 0
        return (measures or bool(self._shares)) and not torch.compiler.is_compiling()

    def _see(
        self, query: torch.Tensor, scale: float | None, mask: torch.Tensor | None = None
    ) -> None:
        """Take note of a query (B, Hq, q, dim) that has attended, and pack what is due.

        A mask, broadcasting to (B, Hq, q, n), tells tokens from left padding, which is neither
        measured nor important.
        """
        if not self.is_initialized or query.shape[-1] != self._keys.spec.dim:
            return
        tokens = self._new_tokens
        start = self.get_seq_length() - tokens
        if mask is not None and mask.ndim:  # the keys of a sliding window begin later than others
            mask = mask[..., -tokens:] if self.is_sliding else mask[..., start : start + tokens]
        with torch.inference_mode(False), torch.no_grad():
            self._queries.see(query, self._keys.heads, tokens, scale, mask, start)
            self._pack()

    def _pack(self) -> None:
        """Pack what has left the window."""
        if self._keys.due:
            block, real = self._block(), self._real()
            if self.options.outlier_bits is not None and not self._keys.n_packed:
                self._raise_outliers(self.options.outlier_bits, real)
            self._keys.pack(self._queries.rms, block, real)
            self._values.pack(None, block, real)
            self._values.slots = self._keys.slots  # one map for both

    def _raise_outliers(self, bits: Bits, real: torch.Tensor | None) -> None:
        """Give heads with outliers their bits, once, before anything is packed."""
        if self.is_sliding:  # whose packed rows leave by age
            return
        heads = {*loud_heads(self._keys, self._queries.rms, real)}
        heads |= {*loud_heads(self._values, None, real)}
        self.options = replace(
            self.options, outlier_bits=None, head_bits=dict.fromkeys(sorted(heads), bits)
        )
        self._divide_heads(self._keys.heads)

    def _real(self) -> torch.Tensor | None:
        """Return which dense tokens are no padding, (B, n_dense) bool; None for all."""
        sinks = self._keys.candidates().start
        recent = self._keys.n_dense - sinks
        real = [
            self._queries.real(start, tokens)
            for start, tokens in ((0, sinks), (self.get_seq_length() - recent, recent))
        ]
        return None if real[0] is None or real[1] is None else torch.cat([real[0], real[1]], 1)

    def _block(self) -> tuple[torch.Tensor, list[int]] | None:
        """Return the tier of each token that is due, and how many each tier gets."""
        if not self._shares:
            return None
        due, packed = self._keys.due, self._keys.n_packed
        rows = [tier.n_rows for tier in self._keys.tiers]
        raised = [
            max(0, int(share * (packed + due)) - n)
            for share, n in zip(self._shares, rows, strict=True)
        ]
        keys = self._keys.dense[:, :, : self._keys.n_dense]
        mass = self._queries.mass(keys, self._real())
        if mass is None:  # nobody looked: the latest tokens count most
            mass = torch.arange(keys.shape[2], device=keys.device, dtype=torch.float32)
            mass = mass.expand(keys.shape[:3])
        counts = [due - sum(raised), *raised]
        return choose(mass[:, :, self._keys.candidates()], counts), counts

    @property
    def keys(self) -> torch.Tensor | SegmentedTensor | None:  # type: ignore[override]
        """All keys (B, Hkv, n, dim), or None before the first token."""
        self._settle()
        return self._keys.view() if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | SegmentedTensor | None:  # type: ignore[override]
        """All values (B, Hkv, n, dim), or None before the first token."""
        self._settle()
        return self._values.view() if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes allocated: codes, scales, shifts, equalizers, sinks and recent window."""
        stores = self._stores()
        maps = [store.slots for store in stores if store.slots is not None]
        shared = {slots.tiers.data_ptr(): slots for slots in maps}
        return sum(x.nbytes for x in (*stores, *shared.values()))

    def _stores(self) -> tuple[Any, ...]:
        self._settle()
        return (self._keys, self._values) if self.is_initialized else ()

    def _settle(self) -> None:
        """Pack what still waits for its attention."""
        if self.is_initialized:
            with torch.inference_mode(False), torch.no_grad():
                self._pack()

    def _map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor t by f(t): a selection along the batch, or a move."""
        for store in self._stores():
            store.map(f)
        if self.is_initialized:
            self._values.slots = self._keys.slots
            with torch.inference_mode(False), torch.no_grad():
                self._queries.map(f)

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self._keys.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the keys that the next update will return."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the layer grows."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.20

    def reset(self) -> None:
        """Forget all tokens."""
        self._keys = self._values = None
        self.is_initialized = False
        self.options = self.given

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; codes of the others stay as they are.

        Where transformers still takes a positive number (before 5.20), it is the length to keep.

        Raises:
            InputError: for a positive number, or more tokens than the layer holds.
        """
        if not self.is_initialized:
            return
        seen = self.get_seq_length()
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding before 5.20 passes a tensor
        if tokens_to_remove > 0 and crop_takes_lengths():
            tokens_to_remove = min(tokens_to_remove - seen, 0)
        if tokens_to_remove > 0 or -tokens_to_remove > seen:
            raise InputError(
                f"crop takes minus the number of tokens to remove, at most {seen} here; "
                f"got {tokens_to_remove}"
            )
        self._crop(-tokens_to_remove)

    def _crop(self, tokens: int) -> None:
        for store in self._stores():
            store.crop(tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select the batch rows `beam_idx`, as beam search asks."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows `indices` (integers or a bool mask)."""
        self._map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move everything back to the device of the keys."""
        if self.is_initialized:
            self._move(self.device)

    def to(self, device: torch.device | str) -> None:
        """Move everything to a device, and expect the next keys there."""
        self.device = torch.device(device)
        self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        self._map(lambda t: t.to(device, non_blocking=True))
