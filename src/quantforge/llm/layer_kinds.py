"""Which layers of a cache files hold, by the names that they have there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantforge.errors import FormatError, UnsupportedError
from quantforge.llm.latent import LatentLayer
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig
from quantforge.llm.saved_layers import (
    Fields,
    Tensors,
    check_alike,
    fill_packed,
    fill_queries,
    fill_store,
    pair_of,
    write_packed,
    write_stores,
)
from quantforge.llm.sliding import QuantForgeSlidingLayer
from quantforge.llm.static import QuantForgeStaticLayer

# ---- layers with fixed buffers ------------------------------------------------------------------


def _write_static(layer: QuantForgeStaticLayer) -> Tensors:
    """Return the arrays of a layer that grows and holds the same."""
    stores = layer._stores()
    if not stores or not stores[0].length:
        return {}
    dense = (layer._window.k_dense, layer._window.v_dense)
    for store, rows in zip(stores, dense, strict=True):
        store.dense = rows[:, :, : store.n_dense]
    tensors = write_stores(layer, *stores)
    for store in stores:
        store.dense = None  # the window has them
    return tensors


def _fill_static(layer: QuantForgeStaticLayer, tensors: Tensors) -> None:
    """Copy tokens into the buffers; the window of a larger page may have to be packed."""
    if not tensors:
        return
    dense = pair_of(tensors)
    layer.lazy_initialization(*dense)
    stores = (layer._keys, layer._values)
    for name, store, rows in zip(("keys", "values"), stores, dense, strict=True):
        buffers = {part: getattr(store, part) for part in ("packed", "scales")}
        store.packed = store.scales = None
        fill_store(name, store, rows, tensors)
        axis, tokens = (2, 1) if store.pages is None else (1, store.pages.layout.tokens)
        room = buffers["packed"].shape[axis] * tokens
        if store.length > layer.max_cache_len or store.n_packed + store.due > room:
            raise FormatError(
                f"{name} has {store.length} tokens, {store.n_packed} of them packed, for which "
                f"max_cache_len={layer.max_cache_len} has no room; load it with a greater one"
            )
        if store.n_rows % tokens:
            raise FormatError(
                f"{name} has {store.n_rows} packed rows, which do not fill pages of {tokens}, as "
                'fixed buffers have them; load it with layout="rows"'
            )
        for part, buffer in buffers.items():
            if (saved := getattr(store, part)) is not None:
                buffer.narrow(axis, 0, saved.shape[axis]).copy_(saved)
            setattr(store, part, buffer)
    check_alike(*stores)
    fill_queries(layer, tensors)
    if stores[0].n_dense > layer._window.k_dense.shape[2]:
        layer._pending = True
        layer._settle()
    else:  # the next token packs what is due, as it would have
        layer._store_back()


# ---- layers of transformers -------------------------------------------------------------------


def _write_dense(layer: DynamicLayer) -> Tensors:
    if layer.keys is None or layer.values is None:
        return {}
    return {"keys.dense": layer.keys, "values.dense": layer.values}


def _fill_dense(layer: DynamicLayer, tensors: Tensors) -> None:
    if tensors:
        keys, values = pair_of(tensors)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values


@dataclass(frozen=True)
class Kind:
    """How layers of a class are written and read.

    Attributes:
        layer: the class.
        make: (settings, fields) -> an empty layer.
        write: layer -> tensors.
        fill: (layer, tensors) gives an empty layer its tokens; raises `FormatError`.
        fields: integers of the layer that belong in the file: {name in the file: attribute}.
    """

    layer: type
    make: Callable[[CacheConfig, Fields], Any]
    write: Callable[[Any], Tensors] = write_packed
    fill: Callable[[Any, Tensors], None] = fill_packed
    fields: Mapping[str, str] = field(default_factory=dict)


WINDOW = {"sliding_window": "sliding_window", "tokens": "cumulative_length"}
KINDS = {
    "full": Kind(QuantForgeLayer, lambda options, fields: QuantForgeLayer(options)),
    "latent": Kind(
        LatentLayer,
        lambda options, fields: LatentLayer(options, fields["rank"]),
        fields={"rank": "rank"},
    ),
    "sliding": Kind(
        QuantForgeSlidingLayer,
        lambda options, fields: QuantForgeSlidingLayer(options, fields["sliding_window"]),
        fields=WINDOW,
    ),
    "static": Kind(
        QuantForgeStaticLayer,
        lambda options, fields: QuantForgeStaticLayer(options, fields["max_cache_len"]),
        _write_static,
        _fill_static,
        fields={"max_cache_len": "max_cache_len"},
    ),
    "dense": Kind(DynamicLayer, lambda options, fields: DynamicLayer(), _write_dense, _fill_dense),
    "dense_sliding": Kind(
        DynamicSlidingWindowLayer,
        lambda options, fields: DynamicSlidingWindowLayer(fields["sliding_window"]),
        _write_dense,
        _fill_dense,
        WINDOW,
    ),
}
"""By the name in files, which stays when classes move."""


def kind_of(layer: Any) -> str:
    """Return the kind of a layer.

    Raises:
        UnsupportedError: for one that files do not hold.
    """
    for name, kind in KINDS.items():
        if type(layer) is kind.layer:
            return name
    raise UnsupportedError(
        f"files do not hold a {type(layer).__name__}; they hold "
        f"{', '.join(sorted(kind.layer.__name__ for kind in KINDS.values()))}"
    )
