"""Work on whole indexes: filled from a stream, learned anew, joined, and cut into parts."""

from __future__ import annotations

import copy
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantforge.errors import InputError
from quantforge.vectordb import intake
from quantforge.vectordb.querying import fetching
from quantforge.vectordb.rerank import Fetch
from quantforge.vectordb.stream import stream_of

if TYPE_CHECKING:
    from quantforge.vectordb.index import QuantizedIndex

REBUILD_ROWS = 1 << 14


def add_from(index: QuantizedIndex, source: Any, ids: Any) -> int:
    """Add vectors of a stream: `QuantizedIndex.add_from`."""
    stream = stream_of(source, index.dim, learn=not index.is_trained)
    before, last, done = index._core, index._catalog.ids.next_id, 0
    added: list[np.ndarray] = []
    try:
        if not index.is_trained and stream.count != 0:
            index.train(stream.sample, stream.count)
        for batch in stream.batches:
            part = None if ids is None else ids[done : done + len(batch)]
            added.append(index.add(batch, part))
            done += len(batch)
        if ids is not None and len(ids) != done:
            raise InputError(f"there must be one id for each of {done} vectors; got {len(ids)}")
    except BaseException:
        index._core = before
        if before is not None:
            index.remove_ids(np.concatenate([index.ids[:0], *added]))
            index.compact()
            before.catalog.ids.next_id = last
        raise
    return done


def rebuild(index: QuantizedIndex, fetch: Fetch | None) -> None:
    """Learn anew and code again: `QuantizedIndex.rebuild`."""
    if not len(index):
        raise InputError("the index is empty; train learns from vectors")
    old = index._known
    old.compact()
    if fetch is None and not old.keeps_originals:
        raise InputError('rebuild needs vectors: originals="float16" in the config, or fetch')
    get = fetching(index, fetch) or old.originals
    rows = torch.arange(len(index)).split(REBUILD_ROWS)
    core = intake.learn(index, (get(part) for part in rows), None)
    for part in rows:
        parts = core.prepare(get(part), old.rows.ids[part])
        core.append(parts | old.catalog.parts(part))
    core.catalog.ids.next_id = old.catalog.ids.next_id
    if old.file is not None:
        before = old.catalog.ids.rows_of(core.catalog.ids.names(torch.arange(len(core.rows))))
        core.rows.exchange("originals", "places", old.rows["places"][before])
        core.file = old.file
    index._core = core


def move_originals(index: QuantizedIndex, path: str | PathLike[str]) -> None:
    """Move the kept vectors into a file: `QuantizedIndex.move_originals`.

    The index and its copies know the file by its path. An `IndexStore` keeps the move with its next
    `compact`: call that before anything is added.
    """
    if index._core is None:
        raise InputError("the index has learned nothing yet; train it or add vectors first")
    index._core.move_originals(path)


def merge(index: QuantizedIndex, other: QuantizedIndex) -> None:
    """Take in another index: `QuantizedIndex.merge`."""
    if (index.dim, index.config) != (other.dim, other.config):
        raise InputError(f"merge needs an index of the same kind; got {other!r} for {index!r}")
    if not len(other):
        return
    index.compact()
    other.compact()
    if index._core is None:
        index._core = copy.deepcopy(other._known)
        index._core.to(index.device)
        return
    ours, theirs = index._core, other._known
    if not ours.has_code_of(theirs):
        raise InputError(
            "the other index has learned something else, so its codes do not fit; train one index, "
            "make the parts as copies of it, and merge these"
        )
    both = torch.isin(theirs.rows.ids, ours.rows.ids)
    if bool(both.any()):
        (name,) = theirs.catalog.ids.names(both.nonzero()[:1, 0]).tolist()
        raise InputError(f"id {name!r} is in both indexes")
    ours.catalog.check_other(theirs.catalog)
    ours.append(theirs.parts())
    ours.catalog.ids.next_id = max(ours.catalog.ids.next_id, theirs.catalog.ids.next_id)


def shard(index: QuantizedIndex, count: int) -> list[QuantizedIndex]:
    """Cut an index into parts: `QuantizedIndex.shard`."""
    if type(count) is not int or count < 1:
        raise InputError(f"count must be a positive integer; got {count!r}")
    found = []
    index.compact()
    for i in range(count):
        part = type(index)(index.dim, index.config).to(index.device)
        if index._core is not None:
            part._core = index._core.part(torch.arange(i, len(index), count))
        found.append(part)
    return found
