"""Which rows belong to which list.

Rows lie in the order of their lists, list l from starts[l] to starts[l + 1]. Fresh rows come after
all of these, as the tail, where each has a label; now and then the tail is merged in. One list is
an index that is always scanned in full.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantforge.vectordb.kmeans import imbalance, nearest
from quantforge.vectordb.rows import Growing

MAX_TAIL_SHARE = 0.1
MIN_TAIL = 4096
"""Rows of the tail that may be there: this share of all, or so many if as many are in order."""


@dataclass(frozen=True)
class Partition:
    """Where lists are.

    Attributes:
        centroids: (lists, dim) float32, on the device of the codes.
        spreads: (lists,) float32, root mean square distance of vectors from their centroid, there
            too; zeros where it is unknown. All else is on the CPU.
        coded: codes are of the difference to the centroid; otherwise it shows the way only.
        curve: (lists,) float32, expected recall of a search in the 1, 2, ... nearest lists; empty
            where it is unknown.
        nprobe: lists that a search looks into by default.
    """

    centroids: torch.Tensor
    spreads: torch.Tensor
    coded: bool
    curve: torch.Tensor
    nprobe: int

    @classmethod
    def single(cls, dim: int) -> Partition:
        """Return one list for everything."""
        one = torch.ones(1)
        return cls(torch.zeros(1, dim), torch.zeros(1), coded=False, curve=one, nprobe=1)

    def __len__(self) -> int:
        return len(self.centroids)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.centroids.nbytes + self.spreads.nbytes + self.curve.nbytes

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Return the list of each vector (n, dim), (n,) int64."""
        if len(self) == 1:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return nearest(x, self.centroids)

    def to(self, device: torch.device, centroids: torch.Tensor | None = None) -> Partition:
        """Return the same on a device, where its centroids may be already."""
        centroids = self.centroids.to(device) if centroids is None else centroids
        return replace(self, centroids=centroids, spreads=self.spreads.to(device))

    def nprobe_for(self, recall: float) -> int:
        """Return the least number of lists that reaches a recall by the curve."""
        good = (self.curve >= recall - 1e-6).nonzero()
        return int(good[0]) + 1 if len(good) else len(self)


class Lists:
    """The lists of rows.

    Args:
        count: how many there are.
        starts: (count + 1,) int64, from 0 rising.
        tail: (t,) int32 labels of the rows after the last start.
    """

    def __init__(self, count: int, starts: torch.Tensor, tail: torch.Tensor) -> None:
        self.count, self.starts = count, starts
        self._tail = Growing(tail)
        self._sizes: torch.Tensor | None = None

    @classmethod
    def of(cls, labels: torch.Tensor, count: int) -> Lists:
        """Return the lists of rows with rising labels (n,)."""
        sizes = torch.bincount(labels, minlength=count)
        return cls(count, _starts(sizes), labels.new_empty(0, dtype=torch.int32))

    @property
    def tail(self) -> torch.Tensor:
        """Labels (t,) int32 of the last rows."""
        return self._tail.rows

    @property
    def sorted_rows(self) -> int:
        """Rows before the tail."""
        return int(self.starts[-1])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        sizes = 0 if self._sizes is None else self._sizes.nbytes
        return self.starts.nbytes + self._tail.nbytes + sizes

    @property
    def sizes(self) -> torch.Tensor:
        """Rows of each list, (count,) int64, the tail's counted."""
        if self._sizes is None:
            self._sizes = self.starts.diff() + torch.bincount(self.tail, minlength=self.count)
        return self._sizes

    @property
    def imbalance(self) -> float:
        """How much longer a scan of a random row's list is than with equal lists, from 1."""
        return imbalance(self.sizes)

    def of_rows(self, index: torch.Tensor) -> torch.Tensor:
        """Return the labels (m,) int64 of rows (m,)."""
        if self.count == 1:
            return torch.zeros_like(index)
        labels = torch.searchsorted(self.starts, index, right=True) - 1
        late = index >= self.sorted_rows
        if bool(late.any()):
            labels[late] = self.tail[index[late] - self.sorted_rows].to(torch.int64)
        return labels

    def append(self, labels: torch.Tensor) -> None:
        """Add rows at the end."""
        self._sizes = None
        if self.count == 1:
            self.starts = self.starts + torch.tensor([0, len(labels)], device=self.starts.device)
        else:
            self._tail.append(labels.to(torch.int32))

    def keep(self, index: torch.Tensor) -> None:
        """Keep these rows alone, (m,) rising."""
        self._sizes = None
        late = index[index >= self.sorted_rows] - self.sorted_rows
        sizes = torch.bincount(self.of_rows(index[: len(index) - len(late)]), minlength=self.count)
        self.starts = _starts(sizes)
        self._tail.keep(late)

    @property
    def is_order_due(self) -> bool:
        """Whether the tail is so long that it should be merged."""
        rows = self.sorted_rows + len(self.tail)
        return len(self.tail) > max(min(MIN_TAIL, self.sorted_rows), MAX_TAIL_SHARE * rows)

    def order(self, device: torch.device) -> torch.Tensor:
        """Return the order of rows that merges the tail, sorted on a device."""
        rows = self.sorted_rows + len(self.tail)
        return self.of_rows(torch.arange(rows)).to(device).argsort(stable=True).cpu()

    def merge(self) -> None:
        """Take the tail in: rows lie as `order` said now."""
        self.starts = _starts(self.sizes)
        self._tail = Growing(self.tail[:0].clone())


def _starts(sizes: torch.Tensor) -> torch.Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
