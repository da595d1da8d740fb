"""Collections on disk: each a folder of `IndexStore`, opened when it is first asked for."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from quantforge.errors import FormatError, InputError
from quantforge.server.errors import ApiError, too_large
from quantforge.server.schemas import (
    NAME_PATTERN,
    CollectionInfo,
    CollectionSettings,
    Found,
    Search,
)
from quantforge.server.settings import Settings
from quantforge.vectordb import IndexConfig, IndexStore

OPTIONS = {"ids", "where", "nprobe", "recall", "rerank"}
"""Of a search, that go to the index as they are."""


def check_results(k: int, queries: int, settings: Settings) -> None:
    """Refuse a search that asks for more than the limits."""
    if k > settings.max_k or k * queries > settings.max_results:
        raise too_large(
            f"at most {settings.max_k} neighbours of a query and {settings.max_results} in "
            f"all; got k={k} for {queries} queries",
            "ask for fewer, or in several requests",
        )


class Collection:
    """One index store, and who may touch it.

    Attributes:
        settings: of the index.
        sizes: name, vectors and bytes held after the last call; for metrics, which do not wait.
    """

    def __init__(self, name: str, store: IndexStore, settings: Settings) -> None:
        self.name, self._store, self._settings = name, store, settings
        self._lock = threading.Lock()
        self._closed = False
        self._measure()
        known = CollectionSettings.model_fields.keys() - {"dim"}
        config = {k: v for k, v in store.index.config.to_dict().items() if k in known}
        self.settings = CollectionSettings(dim=store.index.dim, **config)

    @contextmanager
    def _held(self) -> Iterator[IndexStore]:
        """Yield the store, which is one thread's at a time."""
        with self._lock:
            if self._closed:
                raise ApiError(404, "not_found", f"the collection {self.name!r} has been deleted")
            yield self._store
            self._measure()

    def _measure(self) -> None:
        index = self._store.index
        self.sizes = self.name, len(index), index.memory_report()["total"]

    def info(self) -> CollectionInfo:
        """Return what it holds and takes."""
        with self._held() as store:
            index = store.index
            return CollectionInfo(
                name=self.name,
                settings=self.settings,
                vectors=len(index),
                memory=index.memory_report(),
                float32_bytes=4 * index.dim * len(index),
            )

    def train(self, vectors: np.ndarray) -> None:
        """Learn from a sample, before anything is added.

        Raises:
            InputError: for vectors that do not fit, or a collection that holds some.
        """
        with self._held() as store:
            store.train(vectors)

    def add(self, vectors: np.ndarray, ids: Any, metadata: Any) -> list[Any]:
        """Add vectors, on the disk when this returns, and return their ids.

        Raises:
            InputError: for what does not fit; nothing is added then.
            ApiError: beyond the limit of vectors.
        """
        with self._held() as store:
            limit = self._settings.max_vectors
            if len(store.index) + len(vectors) > limit:
                raise too_large(f"a collection holds at most {limit} vectors", "use another one")
            return np.asarray(store.add(vectors, ids, metadata)).tolist()

    def update(self, vectors: np.ndarray, ids: Any, metadata: Any) -> list[Any]:
        """Replace vectors, on the disk too, and return their ids.

        Raises:
            InputError: for what does not fit, or ids that are not there; all stay as they are then.
        """
        with self._held() as store:
            store.update(ids, vectors, metadata)
            return np.asarray(ids).tolist()

    def remove(self, ids: list[Any]) -> int:
        """Remove vectors, from the disk too.

        Raises:
            InputError: for ids that are not there; nothing is removed then.
        """
        with self._held() as store:
            before = len(store.index)
            store.remove_ids(ids)
            return before - len(store.index)

    def compact(self) -> None:
        """Write the changes so far into new files."""
        with self._held() as store:
            store.compact()

    def page(self, offset: int, limit: int) -> tuple[int, list[Any]]:
        """Return the number of ids, and some of them."""
        with self._held() as store:
            index = store.index
            return len(index), np.asarray(index.ids)[offset : offset + limit].tolist()

    def search(self, queries: np.ndarray | None, asked: Search) -> Found:
        """Return the nearest of each query, or of each point that `asked.like` names.

        Raises:
            InputError: for what does not fit.
            ApiError: beyond the limits.
        """
        k = asked.k
        check_results(k, len(asked.like or ()) if queries is None else len(queries), self._settings)
        options = asked.model_dump(include=OPTIONS, exclude_none=True)
        with self._held() as store:
            index = store.index
            wanted = index.reconstruct(asked.like) if queries is None else queries
            if not len(index) or not len(wanted):
                return Found(ids=[[] for _ in wanted], scores=[[] for _ in wanted])
            ids, scores = index.search(wanted, min(k, len(index)), **options)
            there = np.isfinite(scores)
            found = [row[kept].tolist() for row, kept in zip(ids, there, strict=True)]
            metadata = [index.metadata(row) for row in found] if asked.metadata else None
        kept_scores = [row[kept].tolist() for row, kept in zip(scores, there, strict=True)]
        return Found(ids=found, scores=kept_scores, metadata=metadata)

    def close(self) -> None:
        """Close its files; requests that come later find nothing."""
        with self._lock:
            self._closed = True
            self._store.close()


class Catalog:
    """All collections below a folder.

    Args:
        folder: `folder/<name>` is an index store.
        scratch: a folder on the same disk, for what is being deleted.
        settings: limits.
    """

    def __init__(self, folder: Path, scratch: Path, settings: Settings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._scratch, self._settings = folder, scratch, settings
        self._open: dict[str, Collection] = {}
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """Return the names on disk."""
        pattern = re.compile(NAME_PATTERN)
        return sorted(
            p.name for p in self._folder.iterdir() if p.is_dir() and pattern.match(p.name)
        )

    def opened(self) -> list[Collection]:
        """Return the collections that are open."""
        with self._lock:
            return list(self._open.values())

    def get(self, name: str) -> Collection:
        """Return a collection.

        Raises:
            ApiError: if there is none of this name, or its files are damaged.
        """
        with self._lock:
            if name in self._open:
                return self._open[name]
            if not (self._folder / name).is_dir():
                remedy = "PUT /v1/collections/{name} makes one"
                raise ApiError(404, "not_found", f"there is no collection {name!r}", remedy)
            try:
                store = IndexStore.open(self._folder / name)
            except (FormatError, InputError) as error:
                raise ApiError(500, "damaged", str(error)) from error
            return self._keep(name, store)

    def create(self, name: str, settings: CollectionSettings) -> tuple[Collection, bool]:
        """Return a collection of these settings, and whether it is new.

        Raises:
            ApiError: if there is one of other settings, or there are too many.
            ConfigError: for settings that do not go together.
        """
        config = IndexConfig(**settings.model_dump(exclude={"dim"}))
        with self._lock:
            if (self._folder / name).is_dir():
                collection = self.get(name)
                if collection.settings != settings:
                    message = f"{name!r} has other settings: {collection.settings.model_dump()}"
                    raise ApiError(409, "conflict", message, "delete it, or take another name")
                return collection, False
            if len(self.names()) >= self._settings.max_collections:
                raise too_large(f"a server holds at most {self._settings.max_collections} "
                                "collections", "delete one")  # fmt: skip
            store = IndexStore.create(self._folder / name, settings.dim, config)
            return self._keep(name, store), True

    def _keep(self, name: str, store: IndexStore) -> Collection:
        self._open[name] = Collection(name, store, self._settings)
        return self._open[name]

    def delete(self, name: str) -> None:
        """Remove a collection and its files; damaged ones too.

        Raises:
            ApiError: if there is none of this name.
        """
        with self._lock:
            folder = self._folder / name
            if not folder.is_dir():
                raise ApiError(404, "not_found", f"there is no collection {name!r}")
            collection = self._open.pop(name, None)
            if collection is not None:
                collection.close()
            # one step: a kill leaves the collection whole, or gone
            gone = Path(tempfile.mkdtemp(dir=self._scratch))
            folder.rename(gone / name)
        shutil.rmtree(gone)

    def close(self) -> None:
        """Close all collections."""
        with self._lock:
            for collection in self._open.values():
                collection.close()
            self._open.clear()
