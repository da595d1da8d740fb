"""`ShardedIndex`: files of an index, served by several processes and searched as one.

    folder/*.safetensors     shards, each saved by `QuantizedIndex.save`, ids unique over all
    rank 0                   asks: `search`, `rebalance`
    ranks 1, 2, ...          answer: `serve`

Processes meet in a key-value store of torch.distributed and not in collectives, which wait for
the dead for ever. Rank 0 writes a request; each rank writes its k best under a key of its own;
rank 0 reads what is there by the deadline. A rank that was held up goes on with the newest request.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from safetensors.numpy import load, save
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from quantforge.errors import InputError, QuantForgeError
from quantforge.vectordb.checks import vectors_of
from quantforge.vectordb.index import QuantizedIndex
from quantforge.vectordb.shards import Assignment, Found, assign, merge_found, search_shards

logger = logging.getLogger(__name__)

OnFailure = Literal["error", "partial"]
LISTEN_SECONDS = 1.0
"""After which a rank looks whether it has missed a request."""


class RankError(QuantForgeError):
    """Ranks did not answer in time, or could not.

    Attributes:
        missing: why, by rank.
    """

    def __init__(self, missing: dict[int, str]) -> None:
        super().__init__(
            f"ranks have no answer: {missing}; ask with on_failure='partial' for what the others "
            "have, or call rebalance(without=[...])"
        )
        self.missing = missing


class ShardedResult(tuple[np.ndarray, np.ndarray]):
    """ids (q, k) and scores (q, k), as `QuantizedIndex.search` returns them.

    Attributes:
        missing: why ranks did not contribute, by rank; empty if the result is whole.
    """

    missing: dict[int, str]

    def __new__(cls, found: Found, missing: dict[int, str]) -> ShardedResult:
        """Keep who is missing beside what was found."""
        result = super().__new__(cls, found)
        result.missing = missing
        return result


class ShardedIndex:
    """The shards of a folder, on all ranks.

        index = ShardedIndex("shards", store, rank, world)
        if rank:
            index.serve()                      # until rank 0 closes
        ids, scores = index.search(queries, k=10, timeout=2.0, on_failure="partial")

    Results are those of one `QuantizedIndex` of all vectors, of which the shards were cut, with
    equal scores in the order of ids. One thread of rank 0 may ask at a time.

    Args:
        folder: of the shards, seen by all ranks.
        store: a `TCPStore` or another store of torch.distributed; under torchrun
            `next(torch.distributed.rendezvous("env://"))[0]`.
        rank: of this process, from 0.
        world: number of processes.
        timeout: seconds that rank 0 waits for the others, if a call does not say.

    Raises:
        InputError: for a rank outside the world, or a folder without shards.
        RankError: at rank 0, if ranks could not load their shards in time.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        store: Store,
        rank: int,
        world: int,
        *,
        timeout: float = 30.0,
    ) -> None:
        if not 0 <= rank < world:
            raise InputError(f"rank must be from 0 to world - 1 = {world - 1}; got {rank}")
        self._folder, self._rank, self._world = Path(folder), rank, world
        self._store = PrefixStore("quantforge/sharded", store)
        self._timeout = timeout
        self._shards: dict[str, QuantizedIndex] = {}
        self._version = self._request = 0
        self._assignment: Assignment = {}
        self._count, self._closed = 0, False
        if rank == 0:
            self.rebalance()

    def __len__(self) -> int:
        """Vectors of the ranks that answered when shards were last spread; rank 0 knows."""
        return self._count

    @property
    def assignment(self) -> Assignment:
        """Names of shards by rank, as they were last spread; rank 0 knows."""
        return self._assignment

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._own().dim

    @property
    def metric(self) -> str:
        """What vectors are compared by."""
        return self._own().config.metric

    def _own(self) -> QuantizedIndex:
        own = next(iter(self._shards.values()), None)
        if own is None:
            raise InputError(
                f"rank {self._rank} holds no shard; there must be at least one for each rank"
            )
        return own

    # ---- rank 0 asks ------------------------------------------------------------------------

    def search(
        self,
        queries: Any,
        k: int,
        *,
        nprobe: int | None = None,
        recall: float | None = None,
        where: Any = None,
        timeout: float | None = None,
        on_failure: OnFailure = "error",
    ) -> ShardedResult:
        """Find the k best vectors of each query, as `QuantizedIndex.search`.

        Args:
            queries: (q, dim).
            k: results, at most the number of vectors.
            nprobe: lists to look into, in each shard.
            recall: likewise, by what `calibrate` measured.
            where: a filter over metadata.
            timeout: seconds to wait for other ranks, after this one has its own results.
            on_failure: "partial" returns what ranks have found by then, and says who is missing.

        Raises:
            InputError: for input that does not fit.
            RankError: if ranks are missing and on_failure is "error".

        Cost: q dim 4 bytes to each rank and q k 12 bytes from each.
        """
        if on_failure not in ("error", "partial"):
            raise InputError(f'on_failure must be "error" or "partial"; got {on_failure!r}')
        own = self._own()
        if type(k) is not int or not 1 <= k <= len(self):
            raise InputError(f"k must be an integer from 1 to {len(self)} vectors; got {k!r}")
        query = vectors_of(queries, own.dim, unit_length=False, what="queries").cpu().numpy()
        options = {"nprobe": nprobe, "recall": recall, "where": where}
        given = {name: value for name, value in options.items() if value is not None}
        self._post({"queries": query}, {"k": k, "options": given})
        parts = [self._search_here(query, k, given)]
        replies, missing = self._collect(self._timeout if timeout is None else timeout)
        if missing and on_failure == "error":
            raise RankError(missing)
        for arrays, note in replies.values():
            ids = arrays["ids"]
            if "names" in note:
                ids = np.array(note["names"], object).reshape(arrays["scores"].shape)
            parts.append((ids, arrays["scores"]))
        held = [part for part in parts if part[0].shape[1]] or parts[:1]
        return ShardedResult(merge_found(held, k, squared=own.config.metric == "l2"), missing)

    def rebalance(self, *, without: Iterable[int] = (), timeout: float | None = None) -> Assignment:
        """Spread the shards that are in the folder now over the ranks, moving few.

        Args:
            without: ranks that get none, because they are gone.
            timeout: seconds to wait until all have loaded theirs.

        Returns:
            Names of shards by rank.

        Raises:
            InputError: for a folder without shards, or without=[0].
            RankError: if ranks could not load theirs in time. Call it again without them.
        """
        gone = set(without)
        ranks = [rank for rank in range(self._world) if rank not in gone]
        if 0 not in ranks:
            raise InputError("rank 0 asks the others and cannot be left out")
        sizes = {path.name: path.stat().st_size for path in self._folder.glob("*.safetensors")}
        if not sizes:
            raise InputError(f"{self._folder} holds no shards, which end in .safetensors")
        self._assignment = assign(sizes, ranks, self._assignment)
        names = {str(rank): held for rank, held in self._assignment.items()}
        self._version += 1
        self._store.set(f"assignment/{self._version}", json.dumps(names))
        self._load(self._assignment[0])
        self._post({}, {})
        replies, missing = self._collect(self._timeout if timeout is None else timeout)
        self._count = sum(map(len, self._shards.values()))
        self._count += sum(note["count"] for _, note in replies.values())
        if missing:
            raise RankError(missing)
        return self._assignment

    def close(self) -> None:
        """Let the other ranks return from `serve`; a second call does nothing."""
        if self._rank == 0 and not self._closed:
            self._closed = True
            self._post({}, {"close": True})

    def _post(self, arrays: dict[str, np.ndarray], note: dict[str, Any]) -> None:
        if self._rank != 0:
            raise InputError(f"rank 0 asks; this is rank {self._rank}, which serves")
        self._request += 1
        note = {**note, "version": self._version}
        self._store.set(f"request/{self._request}", _encode(arrays, note))  # type: ignore[arg-type]
        self._store.set("newest", str(self._request))
        if self._request > 1:
            self._store.delete_key(f"request/{self._request - 1}")

    def _collect(
        self, timeout: float
    ) -> tuple[dict[int, tuple[dict[str, np.ndarray], dict[str, Any]]], dict[int, str]]:
        deadline, replies, missing = time.monotonic() + timeout, {}, {}
        for rank in sorted(set(self._assignment) - {0}):
            key = f"reply/{rank}/{self._request}"
            left = max(deadline - time.monotonic(), 0.001)
            if not self._wait(key, left):
                missing[rank] = f"no answer in {timeout:.3g} s"
                continue
            arrays, note = _decode(self._store.get(key))
            if "error" in note:
                missing[rank] = note["error"]
            else:
                replies[rank] = arrays, note
        return replies, missing

    # ---- all ranks answer -------------------------------------------------------------------

    def serve(self) -> None:
        """Answer requests until rank 0 closes.

        Raises:
            torch.distributed.DistNetworkError: if the store has gone.
        """
        answered = 0
        while True:
            if not self._wait(f"request/{answered + 1}", LISTEN_SECONDS):
                if not self._store.check(["newest"]):
                    continue
                newest = int(self._store.get("newest"))
                if newest <= answered or not self._store.check([f"request/{newest}"]):
                    continue
                answered = newest - 1
            number = answered + 1
            if not self._store.check([f"request/{number}"]):  # replaced meanwhile
                continue
            arrays, note = _decode(self._store.get(f"request/{number}"))
            if note.get("close"):
                return
            if answered:
                self._store.delete_key(f"reply/{self._rank}/{answered}")
            reply = self._answer(arrays, note)
            self._store.set(f"reply/{self._rank}/{number}", reply)  # type: ignore[arg-type]
            answered = number

    def _answer(self, arrays: dict[str, np.ndarray], note: dict[str, Any]) -> bytes:
        try:
            if note["version"] != self._version:
                names = json.loads(self._store.get(f"assignment/{note['version']}"))
                self._load(names.get(str(self._rank), []))
                self._version = note["version"]
            if "k" not in note:
                return _encode({}, {"count": sum(map(len, self._shards.values()))})
            ids, scores = self._search_here(arrays["queries"], note["k"], note["options"])
        except (QuantForgeError, OSError) as error:
            logger.exception("rank %d cannot answer", self._rank)
            return _encode({}, {"error": f"{type(error).__name__}: {error}"})
        if ids.dtype == object:
            return _encode({"scores": scores, "ids": np.empty(0)}, {"names": ids.ravel().tolist()})
        return _encode({"scores": scores, "ids": ids}, {})

    def _search_here(self, query: np.ndarray, k: int, options: dict[str, Any]) -> Found:
        held = [index for index in self._shards.values() if len(index)]
        if not held:
            return np.empty((len(query), 0), np.int64), np.empty((len(query), 0), np.float32)
        return search_shards(held, query, k, **options)

    def _load(self, names: list[str]) -> None:
        self._shards = {
            name: self._shards.get(name) or QuantizedIndex.load(self._folder / name)
            for name in names
        }

    def _wait(self, key: str, seconds: float) -> bool:
        try:
            self._store.wait([key], timedelta(seconds=seconds))
        except dist.DistNetworkError:
            raise
        except dist.DistStoreError:
            return False
        return True


def _encode(arrays: dict[str, np.ndarray], note: dict[str, Any]) -> bytes:
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(contiguous, metadata={"note": json.dumps(note)})


def _decode(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), json.loads(header["__metadata__"]["note"])
