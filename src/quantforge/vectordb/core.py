"""What an index is once its data are known: a codec, lists and rows, on tensors that were checked.

Rows travel as named tensors (`rows.Parts`): `prepare` makes them, `append` and `replace` take them
in, and a log that keeps them can have them taken in again.

Rows move: those of a list lie together. The catalog follows them. Those that are removed, or move
to another list, stay marked in their places (`removed`) until they are many.

Codes, centroids and what is multiplied with vectors lie on the device of the codec, and so do
vectors and queries. Ids, lists, metadata, vectors that are kept, numbers of rows and results are in
main memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
import torch

from quantforge.errors import InputError
from quantforge.vectordb import learning, scan
from quantforge.vectordb.bounds import RowBounds
from quantforge.vectordb.catalog import Catalog
from quantforge.vectordb.codec import Codec
from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.drift import Monitor
from quantforge.vectordb.kmeans import ROWS_PER_LIST
from quantforge.vectordb.lists import Lists, Partition
from quantforge.vectordb.originals import Kind, OriginalsFile, pack, unpack
from quantforge.vectordb.removed import MAX_SHARE, Removed
from quantforge.vectordb.rerank import best_of, exact_scores
from quantforge.vectordb.rows import Parts, Rows
from quantforge.vectordb.table import Table
from quantforge.vectordb.two_stage import Plan

MOVED_ROWS = 1 << 14
REPARTITION = 4
"""Lists that only show the way are made anew when so many times as many would be made."""


class Core:
    """A codec and the rows that it has coded.

    Args:
        config: of the index.
        codec: what is known of the data.
        partition: where lists are.
        parts: rows to begin with; None for none.
        lists: which rows belong to which list.

    Attributes:
        catalog: ids and metadata of the rows.
        monitor: of drift.
        file: of the vectors that are kept, if they are not in memory.
        plans: of searches in two stages, by k and recall, with the rows there were.
    """

    def __init__(
        self,
        config: IndexConfig,
        codec: Codec,
        partition: Partition,
        parts: Parts | None = None,
        lists: Lists | None = None,
    ) -> None:
        self.config, self.codec, self.partition = config, codec, partition
        self.file: OriginalsFile | None = None
        nothing = torch.empty(0, dtype=torch.int64)
        if parts is None:
            parts = self.prepare(codec.mean.new_empty(0, len(codec.mean)), nothing)
            parts.pop("lists", None)
        self.rows = Rows(parts)
        self.lists = Lists.of(nothing, len(partition)) if lists is None else lists
        self.catalog = Catalog(self.rows.growing("ids"))
        self.bounds = RowBounds(codec)
        self.monitor = Monitor(len(codec.mean), config.seed)
        self.plans: dict[tuple[int, float], tuple[int, Plan]] = {}
        self._removed_of_list = torch.zeros(len(partition), dtype=torch.int64)

    def __len__(self) -> int:
        """Rows that are there."""
        return len(self.rows) - self.removed.count

    @property
    def removed(self) -> Removed:
        """Rows that are held but not there any more."""
        return self.catalog.ids.removed

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codec.device

    def to(self, device: torch.device) -> None:
        """Move the codes and what is multiplied with vectors."""
        self.codec.to(device)
        self.rows.to(device)
        own = self.codec.centres if self.partition.coded else None
        self.partition = self.partition.to(device, own)
        self.bounds = RowBounds(self.codec)
        self.plans.clear()

    def prepare(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return rows (n, dim) as they are stored; `lists` if their codes depend on it.

        Raises:
            InputError: for a vector whose scale or offset is beyond fp16.
        """
        x = x.to(self.device)
        lists = self.partition.nearest(x) if self.partition.coded else None
        parts = {**self.codec.encode(x, lists).parts, "ids": ids}
        if lists is not None:
            parts["lists"] = lists.to("cpu", torch.int32)
        if self.file is not None:
            parts["places"] = self.file.append(x)
        elif self.config.originals != "none":
            parts["originals"] = pack(x, self.config.originals).cpu()
        return parts

    # ---- rows come, move and go -------------------------------------------------------------

    def append(self, parts: Parts) -> None:
        """Add rows that `prepare` made, at the end; then rows may move."""
        labels = self._labels(parts)
        if self.file is not None and "places" not in parts:
            x = unpack(parts["originals"], len(self.codec.mean))
            parts = {**parts, "places": self.file.append(x)}
        self._take_in(parts, labels)
        if "drift" in parts:
            self.monitor.take(parts["drift"], len(labels))
        if not self.partition.coded:
            wanted = self.config.lists_for(len(self))
            if wanted >= (REPARTITION if len(self.partition) > 1 else 2) * len(self.partition):
                self._make_lists(wanted)
        self._merge_tail()

    def _take_in(self, parts: Parts, labels: torch.Tensor) -> None:
        self.rows.append(parts)
        self.catalog.append(parts)
        self.lists.append(labels)

    def _merge_tail(self) -> None:
        """Bring rows into the order of lists, once many are not."""
        if self.lists.is_order_due:
            self.compact()
            self._arrange(self.lists.order(self.device))
            self.lists.merge()

    def replace(self, index: torch.Tensor, parts: Parts) -> None:
        """Put rows that `prepare` made in the place of others; they keep their ids.

        Those whose list is another now move to the end.
        """
        labels = self._labels(parts)
        moved = labels != self.lists.of_rows(index)
        if bool(moved.any()):
            old, end = index[moved], len(self.rows)
            self._mark(old)
            self._take_in({**self.rows.parts(old), **self.catalog.parts(old)}, labels[moved])
            index = index.clone()
            index[moved] = torch.arange(end, len(self.rows))
        self.rows.put(index, {name: part for name, part in parts.items() if name in self.rows})
        self.bounds.put(self.rows, index)
        self.catalog.put(index, parts)
        self._merge_tail()
        self._drop_many()

    def remove(self, index: torch.Tensor) -> None:
        """Remove rows."""
        self._mark(index)
        self._drop_many()

    def compact(self) -> None:
        """Drop the rows that are removed; those after them move up."""
        if self.removed.count:
            stay = self.removed.left(len(self.rows))
            self.lists.keep(stay)
            self._arrange(stay)
            self._removed_of_list.zero_()

    def _mark(self, index: torch.Tensor) -> None:
        self.removed.mark(index, len(self.rows))
        labels = self.lists.of_rows(index)
        self._removed_of_list += torch.bincount(labels, minlength=len(self.partition))

    def _drop_many(self) -> None:
        if self.removed.count > MAX_SHARE * len(self.rows):
            self.compact()

    def part(self, index: torch.Tensor) -> Core:
        """Return some rows, rising, with what is known of the data; none may be removed ones."""
        lists = Lists.of(torch.empty(0, dtype=torch.int64), len(self.partition))
        core = Core(self.config, self.codec, self.partition, self.rows.parts(index), lists)
        labels = self.lists.of_rows(index)
        core.lists = Lists.of(labels[index < self.lists.sorted_rows], len(self.partition))
        if len(self.partition) > 1:
            core.lists.append(labels[index >= self.lists.sorted_rows])
        core.catalog = Catalog(core.rows.growing("ids"), table=Table())
        core.catalog.append({"ids": core.rows.ids, **self.catalog.parts(index)})
        core.catalog.ids.next_id = self.catalog.ids.next_id
        core.monitor, core.file = copy.deepcopy(self.monitor), copy.deepcopy(self.file)
        return core

    def parts(self) -> dict[str, torch.Tensor]:
        """Return all rows as `append` takes them; none may be removed ones."""
        parts = self.rows.parts(slice(None)) | self.catalog.parts(torch.arange(len(self.rows)))
        if self.partition.coded:
            every = torch.arange(len(self.rows))
            parts["lists"] = self.lists.of_rows(every).to(torch.int32)
        if parts.pop("places", None) is not None:  # which mean nothing elsewhere
            parts["originals"] = pack(self.originals(torch.arange(len(self.rows))), self._kind)
        return parts

    def has_code_of(self, other: Core) -> bool:
        """Whether codes of the other mean the same here."""
        ours, theirs = vars(self.codec.code), vars(other.codec.code)
        same = all(np.array_equal(ours[name], theirs[name]) for name in ours if name != "errors")
        return same and torch.equal(self.codec.centres.cpu(), other.codec.centres.cpu())

    def _arrange(self, index: torch.Tensor) -> None:
        self.bounds.keep(self.rows, index)
        self.rows.keep(index)
        self.catalog.keep(index)

    def _labels(self, parts: Parts) -> torch.Tensor:
        if self.partition.coded:
            return parts["lists"].to(torch.int64)
        if len(self.partition) == 1:
            return torch.zeros(len(parts["ids"]), dtype=torch.int64)
        coded = Rows(parts).coded(slice(None)).to(self.device)
        return self.partition.nearest(self.codec.decode(coded)).cpu()

    def _make_lists(self, nlist: int) -> None:
        """Make lists that show the way, by what codes stand for."""
        self.compact()
        count = min(len(self.rows), ROWS_PER_LIST * nlist)
        generator = torch.Generator().manual_seed(self.config.seed)
        sample = torch.randperm(len(self.rows), generator=generator)[:count].sort().values
        self.partition = learning.learn_partition(
            self.config, self.decode(sample), nlist, coded=False
        )
        every = torch.arange(len(self.rows))
        labels = [self.partition.nearest(self.decode(part)).cpu() for part in every.split(1 << 16)]
        ordered, order = torch.cat(labels).sort(stable=True)
        self._arrange(order)
        self.lists = Lists.of(ordered, nlist)
        self._removed_of_list = torch.zeros(nlist, dtype=torch.int64)

    # ---- reading ----------------------------------------------------------------------------

    @property
    def keeps_originals(self) -> bool:
        """Whether vectors are kept beside their codes."""
        return self.config.originals != "none"

    def move_originals(self, path: str | PathLike[str]) -> None:
        """Move the vectors that are kept into a new file, where new ones follow.

        Raises:
            InputError: for a path that is taken.
        """
        self.compact()
        file = OriginalsFile.create(path, len(self.codec.mean), self._kind)
        rows = torch.arange(len(self.rows)).split(MOVED_ROWS)
        places = torch.cat([file.append(self.originals(part)) for part in rows])
        self.rows.exchange("originals" if self.file is None else "places", "places", places)
        self.file = file

    @property
    def shelf(self) -> scan.Shelf:
        """What is scanned."""
        there = self.removed.bitmap(len(self.rows), self.device)
        coded = self.partition.coded
        return scan.Shelf(self.codec, self.rows, self.lists, coded, self.bounds, there)

    def decode(self, index: torch.Tensor) -> torch.Tensor:
        """Decode rows, (m, dim) float32, on the device of the codes."""
        return self.codec.decode(self.rows.coded(index), self._lists_of(index))

    def best(
        self, query: torch.Tensor, k: int, allowed: torch.Tensor | None, nprobe: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k best scores (q, k) and their rows, of those allowed (rising).

        Args:
            query: (q, dim).
            k: how many.
            allowed: rows, rising, or None for all.
            nprobe: lists to look into; None for the default. More are looked into where these
                hold fewer than k rows.
        """
        nprobe = min(self.partition.nprobe if nprobe is None else nprobe, len(self.partition))
        probes, queries = None, self.codec.queries(query)
        few = allowed is not None and len(allowed) * len(self.partition) <= nprobe * len(self.rows)
        if nprobe < len(self.partition) and not few:
            known = queries.base if self.partition.coded else None
            routes = learning.list_routes(self.config.metric, query, self.partition, known)
            counts = self.lists.sizes - self._removed_of_list
            if allowed is not None:
                labels = self.lists.of_rows(allowed)
                counts = torch.bincount(labels, minlength=len(self.partition))
            probes = scan.nearest_lists(routes, counts.to(routes.device), nprobe, k)
        scores, rows = scan.best(self.shelf, queries, k, probes, allowed)
        return scores.cpu(), rows.cpu()

    def above(
        self, query: torch.Tensor, threshold: float, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return limits (q + 1,), rows and scores of those that score at least the threshold."""
        if allowed is None and self.removed.count:
            allowed = self.removed.left(len(self.rows))
        found = scan.above(self.shelf, self.codec.queries(query), threshold, allowed)
        limits, rows, scores = (part.cpu() for part in found)
        return limits, rows, scores

    def rerank(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        k: int,
        fetch: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k best (q, k) of candidates (q, m), by vectors kept or fetched by rows."""
        return best_of(self.exact_scores(query, rows, fetch), rows, k)

    def exact_scores(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        fetch: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return scores (q, m) of rows by vectors kept or fetched, -inf where a row is -1."""
        vectors_of = self.originals if fetch is None else fetch
        return exact_scores(vectors_of, query.cpu(), rows, squared=self.config.metric == "l2")

    def standard_errors(self, query: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the expected errors (q, m) of the scores of rows."""
        coded, lists = self.rows.coded(index), self._lists_of(index)
        return self.codec.standard_errors(query, coded, lists).cpu()

    def report(self) -> dict[str, int]:
        """Return the bytes held, by part."""
        report = self.rows.report()
        for name, held in self.catalog.report.items():
            report[name] = report.get(name, 0) + held
        report["lists"] = self.lists.nbytes + self.partition.nbytes
        report["learned"] = self.codec.nbytes + self.monitor.nbytes
        report["bounds"] = self.bounds.nbytes
        report["removed"] = self.removed.nbytes
        if self.partition.coded:  # the centroids are the codec's centres
            report["lists"] -= self.partition.centroids.nbytes
        return report

    def list_report(self) -> dict[str, Any]:
        """Return rows and bytes of each list, and how unequal they are."""
        sizes = self.lists.sizes
        return {
            "rows": (sizes - self._removed_of_list).numpy(),
            "bytes": (sizes * self.rows.row_bytes).numpy(),
            "tail": len(self.lists.tail),
            "removed": self.removed.count,
            "imbalance": self.lists.imbalance,
        }

    def _lists_of(self, index: torch.Tensor) -> torch.Tensor | None:
        return self.lists.of_rows(index) if self.partition.coded else None

    def originals(self, index: torch.Tensor) -> torch.Tensor:
        """Return the vectors kept of rows, (m, dim) float32."""
        if self.file is not None:
            return self.file.take(self.rows["places"][index])
        return unpack(self.rows["originals"][index], len(self.codec.mean))

    @property
    def _kind(self) -> Kind:
        if self.config.originals == "none":
            raise InputError('the index keeps no vectors; use originals="float16" or "int8"')
        return self.config.originals
