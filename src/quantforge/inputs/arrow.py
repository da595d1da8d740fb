"""Parquet and Arrow files (needs pyarrow): a column of lists of numbers is an array of vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quantforge.errors import FormatError, InputError, UnsupportedError
from quantforge.inputs.entry import Entry
from quantforge.inputs.rows import BLOCK_NUMBERS, Blocks, RowStream, rows_per_block

Batches = Callable[[list[str] | None, int], Iterator[Any]]
"""Columns, and rows at a time -> record batches."""


def parquet_entries(path: Path) -> dict[str, Entry]:
    """List the columns of a Parquet file.

    Raises:
        FormatError: if it is damaged.
        UnsupportedError: if pyarrow is not installed.
    """
    _pyarrow(path)

    def batches(columns: list[str] | None, rows: int) -> Iterator[Any]:
        with _parquet_file(path) as file:
            yield from file.iter_batches(batch_size=rows, columns=columns, use_threads=False)

    with _readable(path), _parquet_file(path) as file:
        return _entries(path, file.schema_arrow, file.metadata.num_rows, batches)


def arrow_entries(path: Path) -> dict[str, Entry]:
    """List the columns of an Arrow IPC file (Feather version 2) or stream."""
    pyarrow = _pyarrow(path)

    def batches(columns: list[str] | None, rows: int) -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as source:
            for batch in _record_batches(source):
                chosen = batch if columns is None else batch.select(columns)
                chosen.validate(full=True)  # Arrow ends the process where it meets bad offsets
                for start in range(0, batch.num_rows, rows):
                    yield chosen.slice(start, rows)

    with _readable(path):
        with pyarrow.memory_map(str(path)) as source:
            schema = _reader(source).schema
        count = sum(batch.num_rows for batch in batches([], BLOCK_NUMBERS))
        return _entries(path, schema, count, batches)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all rows of a Parquet or Arrow file, without columns of lists and other nested ones.

    Raises:
        FormatError: if it is damaged.
        UnsupportedError: if pyarrow is not installed.
    """
    pyarrow = _pyarrow(path)
    with _readable(path):
        if path.suffix.lower() == ".parquet":
            with _parquet_file(path) as file:
                table = file.read(columns=_flat(file.schema_arrow), use_threads=False)
        else:
            with pyarrow.memory_map(str(path)) as source:
                table = _reader(source).read_all()
                table.validate()
                table = table.select(_flat(table.schema))
                table.validate(full=True)
        return table.to_pylist()


def _flat(schema: Any) -> list[str]:
    from pyarrow import types  # type: ignore[import-untyped,import-not-found,unused-ignore]

    return [field.name for field in schema if not types.is_nested(field.type)]


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UnsupportedError(
            f"reading {path} needs pyarrow: pip install 'quantforge[cli]'"
        ) from error
    return pyarrow


def _parquet_file(path: Path) -> Any:
    from pyarrow import parquet

    # mapped: a stream gets as much memory as a page says it has, before it is found to end
    return parquet.ParquetFile(path, memory_map=True, pre_buffer=False)


def _reader(source: Any) -> Any:
    import pyarrow

    try:
        return pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_stream(source)


def _record_batches(source: Any) -> Iterator[Any]:
    reader = _reader(source)
    known = hasattr(reader, "num_record_batches")
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if known else reader:
        batch.validate()
        yield batch


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the system's own; Arrow raises others for damage
        raise FormatError(f"{path} cannot be read: {error}") from error


def _entries(path: Path, schema: Any, rows: int, batches: Batches) -> dict[str, Entry]:
    found = {}
    for field in schema:
        kind, item = field.type, getattr(field.type, "value_type", None)
        if item is None or not _is_list(kind) or str(item) not in _FLOATS:
            found[field.name] = Entry((rows,), str(kind), partial(_column, path, field.name))
            continue
        dtype = np.dtype(_FLOATS[str(item)])
        width = getattr(kind, "list_size", None) or _first_length(path, field.name, batches)
        if min(rows, width) < 0:
            raise FormatError(
                f"{path}: column {field.name!r} has the impossible shape {rows, width}"
            )
        found[field.name] = Entry(
            (rows, width),
            dtype.name,
            partial(_vectors, path, field.name, (rows, width), dtype, batches),
        )
    return found


_FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _first_length(path: Path, name: str, batches: Batches) -> int:
    for batch in batches([name], 1):
        length = batch.column(0).value_lengths()[0].as_py() if batch.num_rows else 0
        return length or 0
    return 0


def _column(path: Path, name: str) -> Any:
    raise InputError(f"{path}: column {name!r} does not hold vectors, lists of floats")


def _vectors(
    path: Path, name: str, shape: tuple[int, int], dtype: np.dtype[Any], batches: Batches
) -> RowStream:
    def blocks() -> Blocks:
        start = 0
        with _readable(path):
            for batch in batches([name], rows_per_block(shape)):
                yield _matrix(path, name, batch.column(0), shape[1], start)
                start += batch.num_rows

    return RowStream(f"{path}: column {name!r}", shape, dtype, blocks)


def _matrix(path: Path, name: str, column: Any, width: int, start: int) -> np.ndarray:
    """Return a column of lists as (m, width); row `start` of the file is its first."""
    lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(lengths != width)
    if len(bad):
        got = "null" if lengths[bad[0]] < 0 else f"{lengths[bad[0]]} numbers"
        raise InputError(
            f"{path}: column {name!r} must hold {width} numbers in each row, as in the first; row "
            f"{start + bad[0]} has {got}"
        )
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), width)
