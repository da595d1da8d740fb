"""Vectors on their way into an index: checked, learned from, made into rows; nothing is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from quantforge.errors import InputError
from quantforge.vectordb.core import Core
from quantforge.vectordb.drift import Monitor
from quantforge.vectordb.learning import learn as learn_from
from quantforge.vectordb.table import Metadata

if TYPE_CHECKING:
    from quantforge.vectordb.index import QuantizedIndex

MAX_VECTORS = 1 << 32


def learn(index: QuantizedIndex, batches: Iterable[Any], nlist: int | None) -> Core:
    """Return what an index would know after it has learned from batches (n, dim)."""
    monitor = Monitor(index.dim, index.config.seed)
    checked = monitor.learning(index._vectors(batch) for batch in batches)
    codec, partition = learn_from(index.config, index.dim, checked, nlist)
    codec.to(index.device)
    core = Core(index.config, codec, partition)
    core.to(index.device)
    core.monitor = monitor
    return core


def prepare(
    index: QuantizedIndex, x: torch.Tensor, ids: Any, metadata: Metadata | None = None
) -> tuple[dict[str, torch.Tensor], Core | None]:
    """Return new rows as they are stored, and where: an untrained index learns from them.

    Raises:
        InputError: for ids or metadata that do not fit, or more vectors than an index holds.
    """
    new = index._catalog.check(ids, metadata, len(x))
    if len(index) + len(x) > MAX_VECTORS:
        raise InputError(f"an index holds at most {MAX_VECTORS} vectors; use another one")
    if not len(x):
        return new, None
    core = index._core
    if core is None:
        core = learn(index, [x], None)
    else:
        new = {**new, "drift": core.monitor.digest(x)}
    return core.prepare(x, new["ids"]) | new, core


def prepare_update(
    index: QuantizedIndex, ids: Any, vectors: Any, metadata: Metadata | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return rows that are there, and what replaces them.

    Raises:
        InputError: for ids, vectors or metadata that do not fit.
    """
    x = index._vectors(vectors)
    rows = index._rows_of(ids, len(x))
    keys = index._known.rows.ids[rows] if len(index) else torch.empty(0, dtype=torch.int64)
    parts = index._known.prepare(x, keys) if len(x) else {"ids": keys}
    return rows, parts | index._catalog.check_update(metadata, len(x))
