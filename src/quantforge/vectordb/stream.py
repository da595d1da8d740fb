"""Vectors from files and iterables larger than memory, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from quantforge.arrays import open_npy

BATCH_BYTES = 1 << 25
SAMPLE_BYTES = 1 << 28
"""Of an array, what is learned from; of an iterable, what is held back to learn from."""


@dataclass(frozen=True)
class Stream:
    """Where vectors come from.

    Attributes:
        batches: the vectors, once.
        sample: what to learn from.
        count: how many there are, or None if nobody knows.
    """

    batches: Iterable[Any]
    sample: Any
    count: int | None


def stream_of(source: Any, dim: int, *, learn: bool) -> Stream:
    """Return the vectors of a path of a .npy file, an array (n, dim), or an iterable of arrays.

    Args:
        source: where they are; an array may be a memory map.
        dim: vector length.
        learn: whether a sample is needed.
    """
    rows = max(1, SAMPLE_BYTES // (4 * dim))
    if isinstance(source, str | PathLike):
        source = open_npy(source)
    if not hasattr(source, "shape"):
        return _held_back(iter(source), rows if learn else 0)
    sample = None
    if learn:
        count = len(source)
        draw = np.random.RandomState(0)
        chosen = np.arange(count) if count <= rows else np.sort(draw.choice(count, rows, False))
        sample = (source[part] for part in np.array_split(chosen, max(1, len(chosen) // 4096)))
    step = max(1, BATCH_BYTES // (4 * dim))
    batches = (source[start : start + step] for start in range(0, len(source), step))
    return Stream(batches, sample, len(source))


def _held_back(batches: Iterator[Any], rows: int) -> Stream:
    """Take batches until they have so many rows: these are learned from, and then come first."""
    first: list[Any] = []
    count = 0
    while count < rows:
        batch = next(batches, None)
        if batch is None:
            return Stream(first, first, count)
        first.append(batch)
        count += len(batch)

    def all_of_them() -> Iterator[Any]:
        yield from first
        yield from batches

    return Stream(all_of_them(), first, None)
