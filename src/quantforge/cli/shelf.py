"""Indexes as commands meet them: a folder (`IndexStore`) or one file (`QuantizedIndex.save`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from quantforge.cli.common import CommandError
from quantforge.errors import FormatError

if TYPE_CHECKING:
    from quantforge.vectordb import IndexStore, QuantizedIndex

    Changeable: TypeAlias = QuantizedIndex | IndexStore

FILE_SUFFIX = ".safetensors"
STEP_NUMBERS = 1 << 23
"""Numbers added at a time: 32 MiB of float32."""


def is_folder(path: str | PathLike[str]) -> bool:
    """Whether an index of this name is a folder."""
    return Path(path).suffix != FILE_SUFFIX


def is_index(path: str | PathLike[str]) -> bool:
    """Whether there is an index at a path."""
    from quantforge.io import read_metadata
    from quantforge.vectordb import manifest

    path = Path(path)
    if path.is_dir():
        return (path / manifest.NAME).is_file()
    if path.suffix != FILE_SUFFIX:
        return False
    try:
        return "index" in read_metadata(path)
    except FormatError:
        return False


def reading(path: str | PathLike[str]) -> QuantizedIndex:
    """Open an index for reading.

    Raises:
        CommandError: if there is none.
    """
    from quantforge.vectordb import IndexStore, QuantizedIndex

    _check_there(Path(path))
    if is_folder(path):
        return IndexStore.open(path, read_only=True).index
    return QuantizedIndex.load(path)


@contextmanager
def changing(path: Path) -> Iterator[Changeable]:
    """Open an index for changes, which are kept together when the context ends well."""
    from quantforge.vectordb import IndexStore, QuantizedIndex

    _check_there(path)
    if is_folder(path):
        with IndexStore.open(path) as store, store.batch():
            yield store
    else:
        index = QuantizedIndex.load(path)
        yield index
        index.save(path)


@contextmanager
def creating(path: Path, index: QuantizedIndex) -> Iterator[Changeable]:
    """Keep an index at a path, where it takes the place of an old one when the context ends well.

    Args:
        path: of the folder or file.
        index: that has learned what it has to; vectors are added to what is yielded.

    Raises:
        CommandError: for a folder of something else.
    """
    from quantforge.vectordb import IndexStore

    if not is_folder(path):
        yield index
        index.save(path)
        return
    if path.exists() and not is_index(path):
        raise CommandError(f"{path} is no index, and is not replaced by one; remove it yourself")
    fresh = path.with_name(f".{path.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with IndexStore.create_from(fresh, index) as store:
            yield store
            store.compact()
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            path.rename(old)
            fresh.rename(path)
            shutil.rmtree(old)
        else:
            fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def calibrated(path: Path, recall: float, k: int) -> Any:
    """Calibrate an index for good, and return its `Calibration`."""
    from quantforge.vectordb import IndexStore, QuantizedIndex

    _check_there(path)
    if is_folder(path):
        with IndexStore.open(path) as store:
            found = store.index.calibrate(recall, k)
            store.compact()  # lists to look into are part of the base
    else:
        index = QuantizedIndex.load(path)
        found = index.calibrate(recall, k)
        index.save(path)
    return found


def _check_there(path: Path) -> None:
    if not is_index(path):
        raise CommandError(f"there is no index at {path}; make one with quantforge index build")


def add_all(
    index: Changeable, array: Any, ids: Any, metadata: list[Any] | None, *, what: str
) -> int:
    """Add vectors (n, dim) a few at a time; return how many.

    Raises:
        CommandError: for another number of ids or metadata than of vectors.
    """
    from quantforge.arrays import progress_bar

    count, step = len(array), max(1, STEP_NUMBERS // int(array.shape[-1]))
    for name, given in (("ids", ids), ("lines of metadata", metadata)):
        if given is not None and len(given) != count:
            raise CommandError(f"there are {len(given)} {name} for {count} vectors")
    with progress_bar(what, count, None) as advance:
        for start in range(0, count, step):
            rows = slice(start, start + step)
            x, parts = array[rows], {} if metadata is None else {"metadata": metadata[rows]}
            index.add(x, None if ids is None else ids[rows], **parts)
            advance(len(x))
    return count


def stats(path: str | PathLike[str]) -> dict[str, Any]:
    """Return what is known of an index."""
    index = reading(path)
    on_disk = Path(path)
    files = [f for f in on_disk.rglob("*") if f.is_file()] if on_disk.is_dir() else [on_disk]
    memory = index.memory_report()
    return {
        "path": str(path),
        "vectors": len(index),
        "dim": index.dim,
        **{f"config.{key}": value for key, value in index.config.to_dict().items()},
        **{f"memory.{key}": value for key, value in memory.items()},
        "bytes_on_disk": sum(f.stat().st_size for f in files),
    }
