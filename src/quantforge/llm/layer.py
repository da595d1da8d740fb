"""One layer of a quantized cache that grows with its tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from quantforge.errors import ConfigError, InputError
from quantforge.llm.options import CacheConfig
from quantforge.llm.paged import PageFormat
from quantforge.llm.segments import SegmentedTensor
from quantforge.llm.store import Store
from quantforge.numerics.pages import PageLayout, page_layout, why_no_pages
from quantforge.ops.decode_attention.api import why_not_fused
from quantforge.spec import QuantSpec


class QuantForgeLayer(CacheLayerMixin):
    """Keys and values of one attention layer: sinks, packed pages, recent window.

    A token is quantized once, when its page leaves the recent window, and never again. The first
    `update` returns keys and values as they came, so a prompt attends exactly.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, options: CacheConfig) -> None:
        # CacheLayerMixin.__init__ would assign keys and values, which are properties here
        self.options = options
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
        layout = self._page_layout(key, value)
        key_pages = value_pages = None
        if layout is not None:
            key_pages = PageFormat(layout, key, holds_keys=True)
            value_pages = PageFormat(layout, value, holds_keys=False)
        self._keys = Store(options, key, key_pages)
        self._values = Store(options, value, value_pages)
        self.is_initialized = True

    def _page_layout(self, key: QuantSpec, value: QuantSpec) -> PageLayout | None:
        """Return the layout of pages, or None to keep rows."""
        if self.options.layout == "rows":
            return None
        if self.options.layout == "pages":
            if (reason := why_no_pages(key, value)) is not None:
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
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keys.check(key_states)  # both before either is appended
        self._values.check(value_states)
        first = self.get_seq_length() == 0
        # buffers outlive this call: tensors made in inference mode could not be updated outside
        with torch.inference_mode(False), torch.no_grad():
            keys = self._keys.append(key_states)
            values = self._values.append(value_states)
        return (key_states, value_states) if first else (keys, values)

    @property
    def keys(self) -> torch.Tensor | SegmentedTensor | None:  # type: ignore[override]
        """All keys (B, Hkv, n, dim), or None before the first token."""
        return self._keys.view() if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | SegmentedTensor | None:  # type: ignore[override]
        """All values (B, Hkv, n, dim), or None before the first token."""
        return self._values.view() if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes allocated: codes, scales, shifts, equalizers, sinks and recent window."""
        return sum(store.nbytes for store in self._stores())

    def _stores(self) -> tuple[Store, ...]:
        return (self._keys, self._values) if self.is_initialized else ()

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
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; codes of the others stay as they are.

        Raises:
            InputError: for a positive number, or more tokens than the layer holds.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self.get_seq_length():
            raise InputError(
                f"crop takes minus the number of tokens to remove, at most {self.get_seq_length()} "
                f"here; got {tokens_to_remove}"
            )
        for store in self._stores():
            store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select the batch rows `beam_idx`, as beam search asks."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows `indices` (integers or a bool mask)."""
        for store in self._stores():
            store.map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times."""
        for store in self._stores():
            store.map(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move everything to the CPU."""
        for store in self._stores():
            store.map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the device of the keys."""
        for store in self._stores():
            store.map(lambda t: t.to(self.device, non_blocking=True))
