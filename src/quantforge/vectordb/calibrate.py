"""How many lists to look into for a recall, measured on an index as it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantforge.errors import InputError
from quantforge.vectordb.checks import nprobe_of
from quantforge.vectordb.core import Core
from quantforge.vectordb.learning import CURVE_QUERIES, curve_of

if TYPE_CHECKING:
    from quantforge.vectordb.index import QuantizedIndex

RANDOM_ROWS_SEED = 1


@dataclass(frozen=True)
class Calibration:
    """What `QuantizedIndex.calibrate` found.

    Attributes:
        nprobe: lists that a search looks into from now on.
        recall: share of the k best vectors that it finds there.
        nlist: lists there are.
        queries: how many were asked.
    """

    nprobe: int
    recall: float
    nlist: int
    queries: int


def calibrate(
    index: QuantizedIndex, recall: float, k: int, queries: Any, truth: Any
) -> Calibration:
    """Choose nprobe of an index and remember it: `QuantizedIndex.calibrate`."""
    nprobe_of(None, recall)
    if type(k) is not int or not 1 <= k <= len(index):
        raise InputError(f"k must be an integer from 1 to {len(index)} vectors; got {k!r}")
    if index.nlist == 1:
        raise InputError(
            f"the index has no lists to choose from: its {len(index)} vectors are scanned in full; "
            "lists come with more vectors, or set nlist and train"
        )
    core, query, own = index._known, None, None
    if queries is not None:
        query = index._vectors(queries, "queries")
    rows = None if truth is None else _rows_of_truth(index, truth, query)
    if query is None:
        generator = torch.Generator().manual_seed(RANDOM_ROWS_SEED)
        left = core.catalog.ids.left
        own = left[torch.randperm(len(left), generator=generator)[:CURVE_QUERIES]]
        query = core.decode(own)
    partition = core.partition
    if rows is None:
        rows = _full_scan(core, query, k, own)
        labels = core.lists.of_rows(rows.flatten()).view(rows.shape)
        curve = curve_of(core.config, partition, query, labels)
        partition = dataclasses.replace(partition, curve=curve)
        nprobe = partition.nprobe_for(recall)
        reached = float(curve[nprobe - 1])
    else:
        nprobe, reached = _by_truth(core, recall, query, rows)
    core.partition = dataclasses.replace(partition, nprobe=nprobe)
    return Calibration(nprobe, reached, len(partition), len(query))


def _rows_of_truth(index: QuantizedIndex, truth: Any, query: torch.Tensor | None) -> torch.Tensor:
    known = np.asarray(truth)
    if query is None or known.ndim != 2 or len(known) != len(query):
        raise InputError(
            f"truth must be ids (q, k), one row for each query; got shape {known.shape} for "
            f"{'no' if query is None else len(query)} queries"
        )
    distinct, where = np.unique(known, return_inverse=True)
    return index._rows_of(distinct)[torch.from_numpy(where.reshape(known.shape))]


def _full_scan(core: Core, query: torch.Tensor, k: int, own: torch.Tensor | None) -> torch.Tensor:
    nlist = len(core.partition)
    if own is None:
        return core.best(query, min(k, len(core)), None, nlist)[1]
    _, rows = core.best(query, min(k + 1, len(core)), None, nlist)
    others = rows != own[:, None]
    last = others.all(1)  # a vector that is not among its own neighbours: take the first k
    others[last, -1] = False
    return rows[others].view(len(query), -1)


def _by_truth(
    core: Core, recall: float, query: torch.Tensor, truth: torch.Tensor
) -> tuple[int, float]:
    """Bisect for the least nprobe whose results hold enough of the exact neighbours."""

    def reached(nprobe: int) -> float:
        _, rows = core.best(query, truth.shape[1], None, nprobe)
        return float((rows[:, :, None] == truth[:, None]).any(1).float().mean())

    low, high = 0, len(core.partition)
    best = reached(high)
    if best < recall:
        raise InputError(
            f"recall {recall} is out of reach of codes alone: a scan of all {high} lists reaches "
            f"{best:.3f}; use more bits or rerank"
        )
    while high - low > 1:
        middle = (low + high) // 2
        found = reached(middle)
        low, high, best = (low, middle, found) if found >= recall else (middle, high, best)
    return high, best
