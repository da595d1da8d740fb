"""`IndexStore`: an index in a folder, whose changes are on the disk when they return.

    manifest.json          which of these files count
    base-00000003.*        an index, as QuantizedIndex.save writes it
    log-00000003.qf        what changed since, a record for each commit
    lock                   held by the process that writes

What is learned from data, and `compact`, make a new base with an empty log; the manifest switches
to both at once, and the old files go afterwards. Whoever has them mapped may go on reading.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from quantforge.errors import FormatError, InputError
from quantforge.io.atomic import sync_folder
from quantforge.vectordb import changes, manifest
from quantforge.vectordb.catalog import named
from quantforge.vectordb.changes import Change
from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.index import QuantizedIndex
from quantforge.vectordb.lock import WriterLock
from quantforge.vectordb.log import Log
from quantforge.vectordb.manifest import Manifest
from quantforge.vectordb.table import Metadata

logger = logging.getLogger(__name__)

SHARD_BYTES = 4 << 30
"""Of a file of the base; an array that is larger has a file to itself."""

Result = TypeVar("Result")


@dataclass
class State:
    """What is in memory of a folder."""

    manifest: Manifest
    index: QuantizedIndex
    log: Log

    def __post_init__(self) -> None:
        self.known = self.index._core

    def replay(self) -> bool:
        """Take in the commits of the log that are new; return whether there were any."""
        before = start = self.log.nbytes
        for payload in self.log.records():
            where = f"{self.log.path}: the record at byte {start}"
            for change in changes.decode(payload, where):
                changes.apply(self.index, change)
            start = self.log.nbytes
        return start > before


class IndexStore:
    """A folder that holds an index: made by `create`, opened by `open`.

        with IndexStore.create("shelf", 384, IndexConfig(bits=4)) as store:
            store.add(vectors)
            ids, scores = store.index.search(queries, k=10)

    `add`, `update` and `remove_ids` are those of `QuantizedIndex`, and on the disk when they
    return; one that raises leaves folder and index as they were. Ask for `index` each time: some
    calls put another object in its place. One thread at a time may change, refresh or search.
    """

    def __init__(self, folder: Path, lock: WriterLock | None) -> None:
        self._folder, self._lock = folder, lock
        self._state: State | None = None
        self._batch: list[Change] | None = None
        self._learned = self._closed = False
        self._guard = threading.RLock()

    @classmethod
    def create(
        cls, folder: str | PathLike[str], dim: int, config: IndexConfig | None = None
    ) -> IndexStore:
        """Make a folder with an empty index, open for writing.

        Raises:
            InputError: for a bad dim, or a folder that holds a store.
        """
        return cls.create_from(folder, QuantizedIndex(dim, config))

    @classmethod
    def create_from(cls, folder: str | PathLike[str], index: QuantizedIndex) -> IndexStore:
        """Make a folder that holds what this index holds, open for writing.

        Raises:
            InputError: for a folder that holds a store.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        store = cls(folder, WriterLock(folder / "lock"))
        try:
            if (folder / manifest.NAME).exists():
                raise InputError(f"{folder} holds a store already; use IndexStore.open({folder!r})")
            store._write_base(index, 1)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open(cls, folder: str | PathLike[str], *, read_only: bool = False) -> IndexStore:
        """Open a folder as it was last committed.

        Args:
            folder: of a store.
            read_only: any number of readers may be there beside one writer.

        Raises:
            FormatError: for a folder that holds no store, a file that is missing, damaged or of
                another version; the message names it.
            InputError: if another writer has it.
        """
        folder = Path(folder)
        if not (folder / manifest.NAME).exists():
            Manifest.read(folder)  # raises, before a lock file is made in a folder of others
        store = cls(folder, None if read_only else WriterLock(folder / "lock"))
        try:
            store._loaded()
        except BaseException:
            store.close()
            raise
        return store

    # ---- reading ----------------------------------------------------------------------------

    @property
    def index(self) -> QuantizedIndex:
        """The index, for reading: what is changed in it directly is not kept."""
        return self._loaded().index

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        how = "closed" if self._closed else "writable" if self._lock else "read-only"
        return f"IndexStore({str(self._folder)!r}, {how})"

    @property
    def log_bytes(self) -> int:
        """Bytes of changes since the base, which are taken in when the store is opened."""
        return self._loaded().log.nbytes

    def refresh(self) -> bool:
        """Take in what a writer elsewhere has committed; return whether there was anything."""
        with self._guard:
            state = self._loaded()
            if self._lock is not None:
                return False
            if Manifest.read(self._folder) != state.manifest or not state.log.is_continued():
                self._forget()
                self._loaded()
                return True
            with self._forgetting():
                return state.replay()

    def verify(self) -> None:
        """Read all files and compare them with their checksums.

        Raises:
            FormatError: for damage; the message names the file, in a log also the offset.
        """
        self._loaded()

        def check(found: Manifest) -> None:
            found.check_contents(self._folder)
            with Log(self._folder / found.log, writable=False) as log:
                for _ in log.records():
                    pass

        self._with_manifest(check)

    # ---- changing ---------------------------------------------------------------------------

    def train(self, batches: Any) -> None:
        """Learn from a sample, as `QuantizedIndex.train`."""
        with self._guard:
            self._learn(lambda index: index.train(batches))

    def add(self, vectors: Any, ids: Any = None, metadata: Metadata | None = None) -> np.ndarray:
        """Add vectors, as `QuantizedIndex.add`.

        Returns:
            The ids, (n,) int64 or strings.
        """
        with self._guard:
            index = self._writable().index
            if not index.is_trained:
                return self._learn(lambda index: index.add(vectors, ids, metadata))
            change = changes.added(index, vectors, ids, metadata)
            self._commit(change)
            return named(change.parts)

    def update(self, ids: Any, vectors: Any, metadata: Metadata | None = None) -> None:
        """Replace vectors, as `QuantizedIndex.update`."""
        with self._guard:
            self._commit(changes.updated(self._writable().index, ids, vectors, metadata))

    def remove_ids(self, ids: Any) -> None:
        """Remove vectors, as `QuantizedIndex.remove_ids`."""
        with self._guard:
            self._commit(changes.removed(self._writable().index, ids))

    @contextmanager
    def batch(self) -> Iterator[IndexStore]:
        """Commit the changes made in this context together, when it ends.

        All of them are on the disk then; after an exception, none.
        """
        with self._guard:
            state = self._writable()
            if self._batch is not None:
                raise InputError("a batch is open already; batches do not nest")
            self._batch, self._learned = [], False
            try:
                with self._forgetting():
                    yield self
                    index = self._writable().index
                    if self._learned:
                        self._write_base(index, state.manifest.generation + 1)
                    elif self._batch:
                        state.log.append(changes.encode(self._batch))
            finally:
                self._batch = None

    def compact(self) -> None:
        """Write base and log into a new base, which opens without taking in changes."""
        with self._guard:
            state = self._writable()
            if self._batch is not None:
                raise InputError("a batch is open; compact after it")
            self._write_base(state.index, state.manifest.generation + 1)

    def close(self) -> None:
        """Let another process write; what was read from the index stays valid."""
        with self._guard:
            self._forget()
            self._closed = True
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> IndexStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- inside -----------------------------------------------------------------------------

    def _loaded(self) -> State:
        if self._closed:
            raise InputError(f"the store {self._folder} is closed; open it again")
        if self._state is None:
            if self._batch is not None:
                raise InputError("a change of this batch failed half way; leave the batch")
            self._state = self._with_manifest(self._load)
            if self._lock is not None and self._lock.is_held:
                self._state.log.cut()
                self._remove_leftovers(self._state.manifest)
        return self._state

    def _writable(self) -> State:
        state = self._loaded()
        if self._lock is None:
            raise InputError(f"the store {self._folder} is open read-only; open it for writing")
        if not self._lock.is_held:
            raise InputError(f"the store {self._folder} is its parent process's; open it here")
        return state

    def _load(self, found: Manifest) -> State:
        found.check_sizes(self._folder)
        index = QuantizedIndex.load(self._folder / found.base)
        log = Log(self._folder / found.log, writable=self._lock is not None)
        state = State(found, index, log)
        try:
            state.replay()
        except BaseException:
            log.close()
            raise
        return state

    def _with_manifest(self, use: Callable[[Manifest], Result]) -> Result:
        """Call with the manifest, again if a writer replaced its files meanwhile."""
        while True:
            found = Manifest.read(self._folder)
            try:
                return use(found)
            except (FormatError, FileNotFoundError):
                if Manifest.read(self._folder) == found:
                    raise

    def _forget(self) -> None:
        """Drop what is in memory; it is read again when it is needed."""
        if self._state is not None:
            self._state.log.close()
            self._state = None

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Go back to what is on the disk if an exception comes in the middle of a change."""
        try:
            yield
        except BaseException:
            self._forget()
            raise

    def _commit(self, change: Change) -> None:
        state = self._writable()
        if state.index._core is not state.known:
            raise InputError("the index was trained or rebuilt directly; compact() keeps that")
        if not len(change.parts["ids"]):
            return
        lists = state.index.nlist
        with self._forgetting():
            if self._batch is None:
                state.log.append(changes.encode([change]))
            else:
                self._batch.append(change)
            changes.apply(state.index, change)
        if state.index.nlist != lists:
            self._keep_lists()

    def _keep_lists(self) -> None:
        """Write a base where lists were made: they would be made again whenever it is opened."""
        if self._batch is not None:
            self._learned = True
            return
        try:
            self.compact()
        except OSError:
            logger.exception("%s: the change is kept, its new lists are not", self._folder)

    def _learn(self, call: Callable[[QuantizedIndex], Result]) -> Result:
        """Change what is known of the data, which only a new base can hold."""
        state = self._writable()
        # a copy of no vectors; an index that has some refuses
        index = state.index if len(state.index) else state.index.copy()
        result = call(index)
        if not index.is_trained:
            return result
        if self._batch is None:
            self._write_base(index, state.manifest.generation + 1)
        else:
            state.index, state.known, self._learned = index, index._core, True
        return result

    def _write_base(self, index: QuantizedIndex, generation: int) -> None:
        """Switch the folder to a new base that holds this index."""
        folder = self._folder
        base, log = manifest.base_name(generation), manifest.log_name(generation)
        try:
            index.save(folder / base, max_shard_size=SHARD_BYTES)
            files = manifest.files_of(folder, generation)
            Log.create(folder / log)
            Manifest(generation, base, {p.name: manifest.checksum(p) for p in files}, log).write(
                folder
            )
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: a new base could not be written, the store is as it was; make "
                "room and try again",
                str(folder / base),
            ) from error
        finally:
            self._forget()
            there = (folder / manifest.NAME).exists()
            self._remove_leftovers(Manifest.read(folder) if there else None)

    def _remove_leftovers(self, found: Manifest | None) -> None:
        if left := manifest.leftovers(self._folder, found):
            for path in left:
                path.unlink(missing_ok=True)
            sync_folder(self._folder)
