"""Caches that are kept: saved, loaded elsewhere, and continued more than once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Self

from quantforge.llm.cache_file import load_cache, save_cache
from quantforge.llm.layer import QuantForgeLayer


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
    ) -> Self:
        """Read a cache that `save` has written: settings, codes and window, bit by bit.

        Args:
            path: of the file.
            device: where to, or one device for each layer; the model's, or the CPU, if None.
            mmap: on the CPU, read packed rows from the file when they are used, without a copy in
                memory of their own. False reads everything at once.
            model: must be the one that the cache was saved with.
            layout: instead of the saved setting: "auto", "pages" or "rows".

        Raises:
            FormatError: for a file that is damaged, truncated, foreign or from the future; the
                message names the field or array.
            InputError: for another model than the one it was saved with.
            FileNotFoundError: if there is no such file.
        """
        return load_cache(cls, path, device, mmap, model, layout)

    def fork(self) -> Self:
        """Return a cache that continues the same tokens on its own.

        Packed rows are shared until one of the two packs more: a continuation of fewer tokens than
        window and page costs its window only. `copy.deepcopy` does the same.
        """
        for layer in self.layers:
            if isinstance(layer, QuantForgeLayer):
                layer._settle()  # pack once what would be packed in each
        return copy.deepcopy(self)
