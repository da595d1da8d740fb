"""Packed layers of a cache as named tensors, and back: what a file holds of each.

    keys              packed rows (B, Hkv, n, dim), with their scales, shift and equalizer
    keys.dense        [ sinks ][ recent ] in the model's dtype
    keys.tier1, ...   packed rows of important tokens; slots (B, Hkv, n) says whose rows are where.
                      Or of the heads of the second and later groups, where heads differ in bits
    keys.mean, .rms   of the channels, when the first page was packed; keys.query_rms: of queries
    values, ...       likewise
    queries...        what the layer remembers of its queries

Rows are the one layout of files. A layer that holds pages writes the same codes as rows, and reads
rows into pages where its device has the kernel for them, so a file does not depend on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from quantforge.errors import FormatError, UnsupportedError
from quantforge.llm.importance import Slots
from quantforge.llm.joined import Part, parts_of
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.store import Store
from quantforge.ops.pages import codes_of
from quantforge.tensor import QuantTensor

PAGES_AT_ONCE = 64
"""Pages converted at a time: their codes take a byte or more each on the way."""

Tensors = dict[str, torch.Tensor]
Fields = dict[str, Any]

SAVED = {
    "dense", "packed", "scales", "shift", "equalizer", "moments", "query_rms", "tiers", "slots",
    "n_dense", "n_packed", "n_rows", "first", "prefix",
}  # fmt: skip
DERIVED = {
    "options",
    "spec",
    "pages",
    "groups",
    "share_of_tokens",
    "shared",
    "keep",
    "recording",
    "_packs",
    "_unit",
    "_slack",
}


# ---- packed rows ------------------------------------------------------------------------------


def _write_store(name: str, store: Store) -> Tensors:
    if unknown := set(vars(store)) - SAVED - DERIVED:
        raise UnsupportedError(
            f"files of this version do not hold {sorted(unknown)} of a {type(store).__name__}; "
            "save a cache without the setting that needs it"
        )
    assert store.dense is not None, "an initialized store has dense rows"
    tensors: Tensors = {f"{name}.dense": store.dense[:, :, : store.n_dense]}
    first = getattr(store, "first", 0)
    for part, tier in _tiers(name, store):
        if tier.n_rows > first:
            tensors[part] = _rows(tier, first, store.dense.dtype)
    if store.n_packed and store.moments is not None:
        tensors[f"{name}.mean"], tensors[f"{name}.rms"] = store.moments
    if store.n_packed and store.query_rms is not None:
        tensors[f"{name}.query_rms"] = store.query_rms
    return tensors


def _tiers(name: str, store: Store) -> Iterator[tuple[str, Store]]:
    yield name, store
    for i, tier in enumerate(store.tiers, 1):
        yield f"{name}.tier{i}", tier


def packed_stores(layer: QuantForgeLayer) -> Iterator[Store]:
    """Yield every store of a layer that has packed rows, after packing what is due."""
    for store in layer._stores():
        yield from (tier for _, tier in _tiers("", store))


def _rows(store: Store, first: int, dtype: torch.dtype) -> QuantTensor:
    """Return the packed rows from the first one on, whatever their layout."""
    source = store._source(dtype, first)
    assert source is not None, "called where there are rows"
    parts = [rows for part in parts_of(source) for rows in _as_rows(part)]
    packed, scales = parts[0].packed, parts[0].scales
    if len(parts) > 1:
        packed = torch.cat([part.packed for part in parts], 2)
        scales = torch.cat([part.scales for part in parts], 2)
    return QuantTensor(
        packed, scales, store.spec, shift=store.shift, equalizer=store.equalizer, dtype=dtype
    )


def _as_rows(part: Part) -> list[QuantTensor]:
    """Return a part as rows, a few pages at a time."""
    if isinstance(part, QuantTensor):
        return [part]
    step, stop = PAGES_AT_ONCE * part.format.layout.tokens, part.first + part.n
    return [
        dataclasses.replace(part, first=i, n=min(step, stop - i)).rows
        for i in range(part.first, stop, step)
    ]


def fill_store(name: str, store: Store, dense: torch.Tensor, tensors: Tensors) -> None:
    """Give a new store its tokens, as far as a store without tiers knows where they are."""
    store.dense, store.n_dense = dense, dense.shape[2]
    for i, (part, tier) in enumerate(_tiers(name, store)):
        rows = tensors.get(part)
        if rows is not None:
            heads = dense.shape[1] if store.groups is None else len(store.groups.heads[i])
            _check_rows(part, tier, dense, heads, rows)
            _fill_rows(tier, rows)
    store.n_packed = store.n_rows
    mean, rms, store.query_rms = (
        _of_channels(tensors, f"{name}.{part}", dense) for part in ("mean", "rms", "query_rms")
    )
    if mean is not None and rms is not None:
        store.moments = mean, rms


def _of_channels(tensors: Tensors, name: str, dense: torch.Tensor) -> torch.Tensor | None:
    """Return a statistic of the channels of dense rows, or None."""
    found, shape = tensors.get(name), (*dense.shape[:2], 1, dense.shape[3])
    if found is not None and tuple(found.shape) != shape:
        raise FormatError(f"{name} must be of shape {shape}, got {tuple(found.shape)}")
    return found


def _fill_rows(store: Store, rows: Any) -> None:
    store.n_rows, store.shift, store.equalizer = rows.shape[2], rows.shift, rows.equalizer
    if store.pages is None:
        store.packed, store.scales = rows.packed, rows.scales
        return
    step = PAGES_AT_ONCE * store.pages.layout.tokens
    dim, bits = store.spec.dim, store.spec.bits
    pages = [
        store.pages.write(
            codes_of(rows.packed[:, :, i : i + step], dim, bits), rows.scales[:, :, i : i + step, 0]
        )
        for i in range(0, rows.shape[2], step)
    ]
    store.packed = torch.cat(pages, 1).contiguous()


def _check_rows(
    name: str, store: Store, dense: torch.Tensor, heads: int, rows: torch.Tensor
) -> None:
    if not isinstance(rows, QuantTensor) or rows.ndim != 4:
        raise FormatError(f"{name} must be packed rows (batch, heads, tokens, dim)")
    if rows.spec != store.spec:
        raise FormatError(f"{name}: spec must be {store.spec}, by the settings; got {rows.spec}")
    if (*rows.shape[:2], rows.dtype) != (dense.shape[0], heads, dense.dtype):
        raise FormatError(
            f"{name} has batch and heads {tuple(rows.shape[:2])} of {rows.dtype}, but by its dense "
            f"rows and the settings they are {(dense.shape[0], heads)} of {dense.dtype}"
        )
    shape = (*rows.shape[:2], 1, rows.shape[3])
    for part, wanted in (("shift", store.options.shift), ("equalizer", store.options.equalizer)):
        t = getattr(rows, part)
        if (t is not None) != wanted or (t is not None and tuple(t.shape) != shape):
            got = "nothing" if t is None else tuple(t.shape)
            raise FormatError(
                f"{name}: {part} must be {shape if wanted else 'nothing'}, by the settings; got "
                f"{got}"
            )


# ---- layers of ours ---------------------------------------------------------------------------


def write_packed(layer: QuantForgeLayer) -> Tensors:
    """Return the arrays of a layer, none if it is empty."""
    stores = layer._stores()
    if not stores or stores[0].dense is None:
        return {}
    return write_stores(layer, *stores)


def write_stores(layer: QuantForgeLayer, keys: Store, values: Store) -> Tensors:
    """Return the arrays of a layer whose stores hold all of its tokens."""
    tensors = _write_store("keys", keys) | _write_store("values", values)
    if (slots := keys.slots) is not None:
        tensors["slots"] = slots.tiers
        tensors["slots.blocks"] = torch.tensor(slots.blocks, dtype=torch.int32)
        dead = torch.tensor(slots.dead, dtype=torch.int32)
        tensors["slots.dead"] = dead.reshape(len(slots.dead), 2)
    queries = layer._queries
    latest = queries.latest()
    if latest is not None:
        tensors["queries.recent"] = latest
    if queries.squares is not None:
        scale = torch.nan if queries.scale is None else queries.scale
        tensors["queries.squares"] = queries.squares
        rows = queries.rows if isinstance(queries.rows, int) else 0
        tensors["queries.rows_scale"] = torch.tensor([rows, scale], dtype=torch.float64)
        if isinstance(queries.rows, torch.Tensor):  # sequences are padded differently
            tensors["queries.rows"] = queries.rows
    if queries.padding is not None:
        tensors["queries.padding"] = queries.padding
    return tensors


def fill_packed(layer: QuantForgeLayer, tensors: Tensors) -> None:
    """Give an empty layer the tokens of its arrays; `FormatError` where they do not fit."""
    if not tensors:
        return
    dense = pair_of(tensors)
    layer.lazy_initialization(*dense)
    stores = (layer._keys, layer._values)
    for name, store, rows in zip(("keys", "values"), stores, dense, strict=True):
        fill_store(name, store, rows, tensors)
    check_alike(*stores)
    if layer._keys.tiers and layer._keys.groups is None and layer._keys.n_rows:
        slots = _slots(layer._keys, tensors)
        for store in stores:
            store.slots, store.n_packed = slots, slots.alive
    fill_queries(layer, tensors)


def check_alike(keys: Store, values: Store) -> None:
    """Raise `FormatError` unless keys and values have the same packed rows."""
    for (name, k), (_, v) in zip(_tiers("", keys), _tiers("", values), strict=True):
        if k.n_rows != v.n_rows:
            raise FormatError(
                f"values{name} must have as many packed rows as the keys; got {v.n_rows} and "
                f"{k.n_rows}"
            )


def _slots(store: Store, tensors: Tensors) -> Slots:
    """Return whose rows are where, checked against the rows."""
    for name, dtype in (
        ("slots", torch.uint8),
        ("slots.blocks", torch.int32),
        ("slots.dead", torch.int32),
    ):
        if name not in tensors or tensors[name].dtype != dtype:
            raise FormatError(f"{name} must be an array of {dtype}, as tokens have tiers")
    tiers = tensors["slots"]
    blocks, dead = (tensors[f"slots.{name}"].cpu() for name in ("blocks", "dead"))
    rows = torch.tensor([tier.n_rows for _, tier in _tiers("", store)])
    fits = blocks.ndim == 2 and torch.equal(blocks.sum(0), rows) and store.dense is not None
    if not fits or tuple(tiers.shape) != (*store.dense.shape[:2], int(rows.sum())):  # type: ignore[union-attr]
        raise FormatError("slots and slots.blocks must count the packed rows of all tiers")
    for tier, n in enumerate(rows.tolist()):
        if not bool(((tiers == tier).sum(-1) == n).all()):
            raise FormatError(f"slots must name {n} tokens of tier {tier} in each head")
    spans = dead.tolist()
    if dead.ndim != 2 or any(not 0 <= a < b <= tiers.shape[2] for a, b in spans):
        raise FormatError(f"slots.dead must lie within the {tiers.shape[2]} slots")
    return Slots(tiers, tuple(map(tuple, blocks.tolist())), tuple(map(tuple, spans)))


def fill_queries(layer: QuantForgeLayer, tensors: Tensors) -> None:
    """Let a layer remember the queries that it has seen."""
    queries = layer._queries
    if "queries.recent" in tensors:
        queries.recent = [tensors["queries.recent"]]
    squares = _of_channels(tensors, "queries.squares", tensors["keys.dense"])
    if squares is not None:
        numbers = tensors.get("queries.rows_scale", torch.empty(0))
        if numbers.shape != (2,):
            raise FormatError("queries.rows_scale must hold two numbers")
        rows, scale = numbers.tolist()
        queries.squares = squares
        queries.rows = tensors.get("queries.rows", int(rows))
        queries.scale = None if scale != scale else scale
    queries.padding = tensors.get("queries.padding")


def pair_of(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dense keys and values that fit each other."""
    for name in ("keys.dense", "values.dense"):
        if name not in tensors:
            raise FormatError(f"the array {name!r} is missing from the file")
    keys, values = tensors["keys.dense"], tensors["values.dense"]
    alike = (
        keys.ndim == values.ndim == 4
        and keys.shape[:3] == values.shape[:3]
        and keys.dtype == values.dtype
    )
    if not alike or not keys.is_floating_point() or isinstance(keys, QuantTensor):
        raise FormatError(
            "keys.dense and values.dense must be (batch, heads, tokens, dim), alike but for dim; "
            f"got {tuple(keys.shape)} of {keys.dtype} and {tuple(values.shape)} of {values.dtype}"
        )
    return keys, values
