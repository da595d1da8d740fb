"""`QuantizedIndex`: vectors that stay packed, searched by scoring their codes."""

from __future__ import annotations

import copy
from os import PathLike
from typing import Any

import numpy as np
import torch

from quantforge.errors import InputError
from quantforge.vectordb import bulk, files, intake, querying
from quantforge.vectordb.calibrate import Calibration, calibrate
from quantforge.vectordb.catalog import Catalog, named
from quantforge.vectordb.checks import CPU, vectors_of
from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.core import Core
from quantforge.vectordb.drift import Drift, Monitor
from quantforge.vectordb.querying import Rerank
from quantforge.vectordb.rerank import Fetch
from quantforge.vectordb.table import Metadata


class QuantizedIndex:
    """Vectors as codes, in one list that is scanned in full, or in many of which some are.

        index = QuantizedIndex(384, IndexConfig(bits=4))
        index.add(vectors)
        ids, scores = index.search(queries, k=10)

    Args:
        dim: vector length.
        config: bits, mode, metric; `IndexConfig()` if None.

    Scores are inner products, cosines, or squared distances, by the metric. What a mode learns
    comes from `train`, or from the first `add`. From 10,000 vectors on there are lists (IVF): rows
    of a list lie together, so rows may move when vectors are added or updated.

    A call that raises leaves the index as it was.
    """

    def __init__(self, dim: int, config: IndexConfig | None = None) -> None:
        if type(dim) is not int or dim < 1:
            raise InputError(f"dim must be a positive integer; got {dim!r}")
        self.dim = dim
        self.config = IndexConfig() if config is None else config
        self._core: Core | None = None
        self._device = CPU

    def __len__(self) -> int:
        return 0 if self._core is None else len(self._core)

    def __repr__(self) -> str:
        return f"QuantizedIndex({self.dim}, {self.config}, vectors={len(self)})"

    @property
    def is_trained(self) -> bool:
        """Whether the data are known, as far as the mode wants to know them."""
        return self._core is not None

    @property
    def ids(self) -> np.ndarray:
        """Ids (n,), int64 or strings, in the order of rows, which bitmaps follow."""
        return self._catalog.ids.names(self._catalog.ids.left)

    @property
    def nlist(self) -> int:
        """Lists that rows are in; 1 is an index that is scanned in full."""
        return 1 if self._core is None else len(self._core.partition)

    @property
    def nprobe(self) -> int:
        """Lists that a search looks into, if it does not say how many."""
        return 1 if self._core is None else self._core.partition.nprobe

    @property
    def device(self) -> torch.device:
        """Where codes are held, made and searched."""
        return self._device

    def to(self, device: torch.device | str) -> QuantizedIndex:
        """Move the codes to a device, such as "cuda", where vectors and queries are then taken too.

        Ids, metadata, lists and vectors that are kept stay in main memory; so do results.

        Returns:
            This index.
        """
        device = torch.empty(0, device=device).device  # "cuda" is the current one of several
        if self._core is not None:
            self._core.to(device)
        self._device = device
        return self

    def train(self, batches: Any, expected: int | None = None) -> None:
        """Learn mean, directions, bits and lists from a sample, in one pass.

        Args:
            batches: vectors (n, dim), or an iterable of such arrays.
            expected: vectors that the index will hold, which decides how many lists there are; n
                if None.

        Raises:
            InputError: for vectors that do not fit, fewer than 2 of them (but in the oblivious
                mode) or than lists, or an index that holds vectors.
        """
        if len(self):
            raise InputError(
                f"the index holds {len(self)} vectors, coded by what is known; use rebuild, or "
                "train a new one"
            )
        batches = [batches] if hasattr(batches, "shape") else batches
        nlist = max(1, self.config.nlist) if self.config.nlist is not None else None
        if expected is not None:
            if type(expected) is not int or expected < 1:
                raise InputError(f"expected must be a positive integer; got {expected!r}")
            nlist = self.config.lists_for(expected)
        self._core = intake.learn(self, batches, nlist)

    def add(self, vectors: Any, ids: Any = None, metadata: Metadata | None = None) -> np.ndarray:
        """Add vectors; an untrained index learns from them first.

        Args:
            vectors: (n, dim), numpy or torch.
            ids: (n,) new integers from 0, or strings: the first ones decide. If None, integers are
                numbered on from the greatest.
            metadata: values by column, n each, or n mappings: integers, floats, bools, strings, or
                None for no value.

        Returns:
            The ids, (n,) int64 or strings.

        Raises:
            InputError: for vectors, ids or metadata that do not fit.
        """
        x = self._vectors(vectors)
        parts, core = intake.prepare(self, x, ids, metadata)
        if core is not None:
            core.append(parts)
            self._core = core
        return named(parts)

    def add_from(self, source: Any, ids: Any = None) -> int:
        """Add vectors from a file or iterable that may be larger than memory.

        Args:
            source: the path of a .npy file (n, dim), an array (n, dim) such as a memory map, or an
                iterable of arrays. An untrained index learns from a sample of it first, 256 MiB as
                float32: a random one, of an iterable the beginning.
            ids: (n,) of all of them; numbered on if None.

        Returns:
            How many were added. If a batch does not fit, none is.

        Raises:
            InputError: for vectors or ids that do not fit.
        """
        return bulk.add_from(self, source, ids)

    def search(
        self,
        queries: Any,
        k: int,
        *,
        nprobe: int | None = None,
        recall: float | None = None,
        ids: Any = None,
        bitmap: Any = None,
        where: Any = None,
        rerank: Rerank = None,
        fetch: Fetch | None = None,
        two_stage: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k best vectors of each query; equal ones in the order of rows.

        Args:
            queries: (q, dim).
            k: results, at most the number of vectors.
            nprobe: lists to look into, and more where they hold fewer than k that may be found.
            recall: look into as many lists as hold this share of the neighbours, by what
                `calibrate` measured, or a sample when the lists were made.
            ids: only these may be found.
            bitmap: (ceil(n / 8),) uint8, bit `i % 8` of byte `i // 8` set where row i may be found
                (`numpy.packbits(allowed, bitorder="little")`).
            where: a filter over metadata such as {"year": {"gte": 2020}}, see `vectordb.where`.
            rerank: take this many by their codes, and the best of them by the vectors themselves:
                those kept (`originals` in the config) or fetched. "auto" takes for each query as
                many as hold `recall` (0.99) of its neighbours, by the standard errors of scores.
            fetch: a function of ids (m,) that returns vectors (m, dim), for rerank.
            two_stage: read the cheap part of all codes and the rest of those that may be among the
                best, to find this share of what whole codes find; without lists and filters.

        Returns:
            ids (q, k), int64 or strings, and scores (q, k) float32, best first. Where a filter
            leaves fewer than k there are id -1 (None) and score -inf (inf for distances).

        Raises:
            InputError: for input that does not fit, or k greater than the index.
        """
        return querying.search(
            self,
            queries,
            k,
            nprobe=nprobe,
            recall=recall,
            allowed=self._catalog.allowed(ids, bitmap, where),
            rerank=rerank,
            fetch=fetch,
            stages=two_stage,
        )

    def range_search(
        self,
        queries: Any,
        threshold: float,
        *,
        ids: Any = None,
        bitmap: Any = None,
        where: Any = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find all vectors that score at least the threshold (l2: at most), in all lists.

        Args:
            queries: (q, dim).
            threshold: a score.
            ids: only these may be found.
            bitmap: likewise, as for `search`.
            where: likewise.

        Returns:
            limits (q + 1,), ids and scores: query i has those from limits[i] to limits[i + 1],
            in the order of rows.
        """
        query, sign = self._vectors(queries, "queries"), -1 if self.config.metric == "l2" else 1
        allowed = self._catalog.allowed(ids, bitmap, where)
        if not len(self):
            empty = np.empty(0, np.float32)
            return np.zeros(len(query) + 1, np.int64), self.ids, empty
        limits, rows, scores = self._known.above(query, sign * threshold, allowed)
        return limits.numpy(), self._catalog.ids.names(rows), (sign * scores).numpy()

    def standard_errors(self, queries: Any, ids: Any) -> np.ndarray:
        """Return the expected error (q, m) of the scores of queries with these vectors."""
        query, rows = self._vectors(queries, "queries"), self._rows_of(ids)
        if not len(rows):
            return np.empty((len(query), 0), np.float32)
        return self._known.standard_errors(query, rows).numpy()

    def reconstruct(self, ids: Any) -> np.ndarray:
        """Decode vectors, (m, dim) float32."""
        rows = self._rows_of(ids)
        if not len(rows):
            return np.empty((0, self.dim), np.float32)
        return self._known.decode(rows).cpu().numpy()

    def remove_ids(self, ids: Any) -> None:
        """Remove vectors; the rows after them move up.

        Their memory is freed when they are a quarter of all rows, by `compact`, and by `save`.

        Raises:
            InputError: for ids that are not in the index; nothing is removed then.
        """
        rows = self._rows_of(ids)
        if len(rows):
            self._known.remove(rows)

    def compact(self) -> None:
        """Free the memory of vectors that were removed or replaced; all others are copied."""
        if self._core is not None:
            self._core.compact()

    def update(self, ids: Any, vectors: Any, metadata: Metadata | None = None) -> None:
        """Replace vectors, (m, dim); those that go to another list get another row.

        Columns of metadata that are given are replaced too; others stay as they are.
        """
        rows, parts = intake.prepare_update(self, ids, vectors, metadata)
        if len(rows):
            self._known.replace(rows, parts)

    def metadata(self, ids: Any) -> list[dict[str, Any]]:
        """Return what is known of vectors, one mapping each, without the columns they miss."""
        return self._catalog.table.rows(self._rows_of(ids))

    def calibrate(
        self, recall: float = 0.95, k: int = 10, queries: Any = None, truth: Any = None
    ) -> Calibration:
        """Choose nprobe for a recall, and remember it, in files too.

        Args:
            recall: share of the k best that a search has to find.
            k: neighbours that count.
            queries: (q, dim) of the kind that will come, not in the index. Some of its own vectors,
                as their codes have them, if None.
            truth: (q, k) ids of the exact neighbours of the queries. If None the results of a full
                scan of the codes are to be found.

        Raises:
            InputError: for an index without lists, or a recall that all lists do not reach.
        """
        return calibrate(self, recall, k, queries, truth)

    def drift(self) -> Drift:
        """Report whether what was added looks like what was learned; `add` warns of it once."""
        return Monitor(self.dim, 0).report() if self._core is None else self._core.monitor.report()

    def rebuild(self, fetch: Fetch | None = None) -> None:
        """Learn anew from the vectors, and code them again.

        Worth it when an index has grown far beyond what it learned from: its lists are made for as
        many vectors as there are, and codes are of the differences to their centroids.

        Args:
            fetch: a function of ids (m,) that returns vectors (m, dim), asked twice for each; the
                originals that the index keeps if None.
        """
        bulk.rebuild(self, fetch)

    def merge(self, other: QuantizedIndex) -> None:
        """Take in all vectors of another index that has learned the same, such as a shard or copy.

        Raises:
            InputError: for an index of another kind, or one that has learned something else, or an
                id that is in both.
        """
        bulk.merge(self, other)

    def shard(self, count: int) -> list[QuantizedIndex]:
        """Return `count` indexes that have every count-th vector each; `merge` joins them again."""
        return bulk.shard(self, count)

    def move_originals(self, path: str | PathLike[str]) -> None:
        """Move the kept vectors into a new safetensors file, to which those to come are added."""
        bulk.move_originals(self, path)

    def copy(self) -> QuantizedIndex:
        """Return an index of its own with the same vectors."""
        return copy.deepcopy(self)

    def memory_report(self) -> dict[str, int]:
        """Return the bytes held, by part and in `total`."""
        report = {} if self._core is None else self._core.report()
        return {**report, "total": sum(report.values())}

    def list_report(self) -> dict[str, Any]:
        """Return rows and bytes of each list, and how unequal they are.

        Returns:
            rows: (nlist,) int64.
            bytes: (nlist,) int64, of what is stored of these and of removed rows.
            tail: rows that are not in the order of lists yet.
            removed: rows that are held, but not in the index any more.
            imbalance: nlist sum(rows^2) / sum(rows)^2, 1 where all are equal.
        """
        if self._core is None:
            raise InputError("the index has no lists: it has learned nothing yet")
        return self._core.list_report()

    def save(self, path: str | PathLike[str], *, max_shard_size: int | str | None = None) -> None:
        """Write one file, or shards as `save_file` does; it takes the place of an old one whole.

        The index is compact afterwards.
        """
        self.compact()
        files.save(path, self.dim, self.config, self._core, max_shard_size)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> QuantizedIndex:
        """Open a file that `save` wrote; its pages are read when they are touched.

        Raises:
            FormatError: for a damaged file, another kind of file, or one of a later version.
        """
        dim, config, core = files.load(path)
        index = cls(dim, config)
        index._core = core
        return index

    # ---- inside -----------------------------------------------------------------------------

    @property
    def _catalog(self) -> Catalog:
        return Catalog.empty() if self._core is None else self._core.catalog

    @property
    def _known(self) -> Core:
        assert self._core is not None, "asked of an index without rows"
        return self._core

    def _vectors(self, x: Any, what: str = "vectors") -> torch.Tensor:
        unit_length = self.config.metric == "cosine"
        return vectors_of(x, self.dim, unit_length=unit_length, what=what, device=self._device)

    def _rows_of(self, ids: Any, n: int | None = None) -> torch.Tensor:
        return self._catalog.ids.rows_of(ids, n)
