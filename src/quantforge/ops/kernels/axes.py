"""Tensors of any shape and stride as (batch, heads, n, ...), as kernels see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TOO_MANY = "its leading axes do not merge into three"


@dataclass(frozen=True)
class Axes:
    """Leading axes of several tensors, merged to three.

    Attributes:
        sizes: batch, heads and n.
        strides: for each tensor its three strides, in elements.
    """

    sizes: tuple[int, int, int]
    strides: tuple[tuple[int, int, int], ...]


def row_strides(t: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of the leading axes of t, broadcast to `shape`."""
    return t.expand(*shape, t.shape[-1]).stride()[:-1]


def merge(
    strides: Sequence[tuple[int, ...]], shape: Sequence[int], *, keep_rows: bool = False
) -> Axes | None:
    """Merge leading axes of the sizes `shape` that run through memory as one in every tensor.

    With `keep_rows` the last axis stays one of its own. None where more than three axes remain.
    """
    sizes: list[int] = []
    kept: list[tuple[int, ...]] = []
    for axis, size in enumerate(shape):
        here = tuple(s[axis] for s in strides)
        is_rows = keep_rows and axis == len(shape) - 1
        if size == 1 and not is_rows:
            continue
        if kept and not is_rows and kept[-1] == tuple(stride * size for stride in here):
            sizes[-1] *= size
            kept[-1] = here
        else:
            sizes.append(size)
            kept.append(here)
    if len(sizes) > 3:
        return None
    sizes = [1] * (3 - len(sizes)) + sizes
    kept = [(0,) * len(strides)] * (3 - len(kept)) + kept
    columns = tuple((kept[0][i], kept[1][i], kept[2][i]) for i in range(len(strides)))
    return Axes((sizes[0], sizes[1], sizes[2]), columns)
