"""Caches that are kept: saved, loaded elsewhere, and continued more than once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Self

import torch

from quantforge.llm.cache_file import load_cache, save_cache
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.saved_layers import packed_stores


class PromptCache:
    """What a `QuantForgeCache` can do with the prompt it holds. See docs/prompt_caches.md."""

    layers: list[Any]

    def save(
        self,
        path: str | PathLike[str],
        *,
        model: Any = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write all tokens to a safetensors file, codes as they are, in place of an older file.

        Args:
            path: of the file.
            model: whose keys and values these are; its fingerprint is kept, and `load` can check.
            metadata: strings of your own, for instance the text; `quantforge.io.read_metadata`
                reads them.

        Raises:
            UnsupportedError: for layers that files do not hold.
            InputError: for metadata that are not strings, or a model whose weights cannot be read.
        """
        save_cache(self, path, model, metadata)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        device: Any | Sequence[Any] = None,
        mmap: bool = True,
        model: Any = None,
        layout: str | None = None,
        max_cache_len: int | Literal["saved"] | None = "saved",
    ) -> Self:
        """Read a cache that `save` has written: settings, codes and window, bit by bit.

        Args:
            path: of the file.
            device: where to, or one device for each layer; the model's, or the CPU, if None.
            mmap: on the CPU, read packed rows from the file when they are used, without a copy in
                memory of their own. False reads everything at once.
            model: must be the one that the cache was saved with.
            layout: instead of the saved setting: "auto", "pages" or "rows".
            max_cache_len: tokens for which fixed buffers have room, None for a cache that grows;
                what it was if left out.

        Raises:
            FormatError: for a file that is damaged, truncated, foreign or from the future; the
                message names the field or array.
            InputError: for another model than the one it was saved with.
            ConfigError: for settings that a cache with `max_cache_len` cannot have.
            UnsupportedError: for layers that cannot have fixed buffers.
            FileNotFoundError: if there is no such file.
        """
        return load_cache(cls, path, device, mmap, model, layout, max_cache_len)

    def fork(self) -> Self:
        """Return a cache that continues the same tokens on its own.

        Packed rows are shared from then on: a continuation costs its window and what it packs
        itself. A sliding window shares them until it packs more, as they leave it anyway; layers
        with `max_cache_len`, which write in place, are copied in full.
        """
        memo: dict[int, Any] = {}
        for layer in self.layers:
            if isinstance(layer, QuantForgeLayer) and not layer.is_compileable:
                # `_stores` packs once what would be packed in each
                for store in packed_stores(layer):
                    memo |= {id(x): x for x in store.share()}
        with torch.inference_mode(False):
            return copy.deepcopy(self, memo)
