"""Metadata of vectors: columns beside the rows of an index.

    type       held as                                        missing
    int64      int64                                          -2^63
    float64    float64                                        NaN
    bool       int8                                           -1
    string     int32, a place among the distinct strings      -1

A column begins with its first value; rows before and rows that say nothing of it miss it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from quantforge.errors import FormatError, InputError
from quantforge.vectordb.rows import Growing
from quantforge.vectordb.texts import Texts

Type = Literal["int64", "float64", "bool", "string"]
DTYPES: dict[Type, torch.dtype] = {
    "int64": torch.int64,
    "float64": torch.float64,
    "bool": torch.int8,
    "string": torch.int32,
}
MISSING: dict[Type, float] = {"int64": -(2**63), "float64": float("nan"), "bool": -1, "string": -1}
RESERVED = ("and", "or", "not")
"""Words of filters, which no column may be called."""
EXACT = 2**53
"""Integers up to here are exact in float64."""

Metadata = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A sequence of values for each column, or one mapping for each row; None is a missing value."""


@dataclass(frozen=True)
class Values:
    """Checked values of one column for some rows: Python objects, None where there is none."""

    type: Type
    items: list[Any]


class Column:
    """One column.

    Args:
        type: of its values.
        rows: (n,) as the table above says.
        words: distinct strings, for the type "string".
    """

    def __init__(self, type: Type, rows: torch.Tensor, words: Texts | None = None) -> None:
        self.type = type
        self._rows, self._stored = Growing(rows), words

    @cached_property
    def words(self) -> list[str]:
        """Distinct strings, read from a file when they are first needed."""
        stored = self._stored
        return [] if stored is None else stored.at(torch.arange(len(stored)))

    @cached_property
    def _place(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    @property
    def rows(self) -> np.ndarray:
        """What is held, (n,)."""
        return self._rows.rows.numpy()

    @property
    def missing(self) -> np.ndarray:
        """Rows without a value, (n,) bool."""
        return np.isnan(self.rows) if self.type == "float64" else self.rows == MISSING[self.type]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer and of the distinct strings, as Python or a file holds them."""
        words = 0 if self._stored is None else self._stored.nbytes
        for name in ("words", "_place"):
            words += sys.getsizeof(self.__dict__.get(name, ""))
        words += sum(map(sys.getsizeof, self.__dict__.get("words", ())))
        return self._rows.nbytes + words

    def append(self, items: list[Any] | None, n: int) -> None:
        """Add n rows, missing ones if there are no items."""
        self._rows.append(self._held([None] * n if items is None else items))

    def put(self, index: torch.Tensor, items: list[Any]) -> None:
        """Overwrite rows."""
        self._rows.put(index, self._held(items))

    def keep(self, index: torch.Tensor) -> None:
        """Keep these rows alone, in this order, and of the strings those that are left."""
        self._rows.keep(index)
        if self.type == "string" and len(self.words) > len(index):
            held = self._rows.rows
            used, place = held[held >= 0].unique(return_inverse=True)
            left = [self.words[i] for i in used.tolist()]
            held[held >= 0] = place.to(torch.int32)
            self.words, self._place = left, {word: i for i, word in enumerate(left)}

    def items(self, index: torch.Tensor) -> list[Any]:
        """Return the values of rows as Python objects, None where there is none."""
        held, missing = self.rows[index.numpy()].tolist(), self.missing[index.numpy()]
        if self.type == "string":
            held = [None if i < 0 else self.words[i] for i in held]
        elif self.type == "bool":
            held = [value == 1 for value in held]
        return [None if gone else value for value, gone in zip(held, missing, strict=True)]

    def place_of(self, word: str) -> int:
        """Return where a string is among the distinct ones, -2 if nowhere."""
        return self._place.get(word, -2)

    def _held(self, items: list[Any]) -> torch.Tensor:
        absent = MISSING[self.type]
        if self.type == "string":
            for word in items:
                if word is not None and word not in self._place:
                    self._place[word] = len(self.words)
                    self.words.append(word)
            items = [None if word is None else self._place[word] for word in items]
        held = [absent if value is None else value for value in items]
        return torch.tensor(held, dtype=DTYPES[self.type])


class Table:
    """Columns by name, each with n rows."""

    def __init__(self, columns: Mapping[str, Column] | None = None, n: int = 0) -> None:
        self.columns = dict(columns or {})
        self._n = n

    def __len__(self) -> int:
        return self._n

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(column.nbytes for column in self.columns.values())

    def check(self, metadata: Metadata | None, n: int) -> dict[str, Values]:
        """Read metadata of n rows; nothing is changed.

        Raises:
            InputError: for a wrong count, a value of no known type, or of another than its column.
        """
        if metadata is None:
            return {}
        given = metadata if isinstance(metadata, Mapping) else _by_column(metadata, n)
        found = {}
        for name, values in given.items():
            if not isinstance(name, str) or not name or name in RESERVED:
                raise InputError(
                    f"a column is named by a string other than {', '.join(RESERVED)}; got {name!r}"
                )
            known = self.columns[name].type if name in self.columns else None
            checked = _values(name, values, n, known)
            if checked is not None:
                found[name] = checked
        return found

    def append(self, values: Mapping[str, Values], n: int) -> None:
        """Add n rows that `check` has seen."""
        for name in values:
            if name not in self.columns:
                kind = values[name].type
                absent = torch.full((self._n,), MISSING[kind], dtype=DTYPES[kind])
                self.columns[name] = Column(kind, absent)
        for name, column in self.columns.items():
            column.append(values[name].items if name in values else None, n)
        self._n += n

    def put(self, index: torch.Tensor, values: Mapping[str, Values]) -> None:
        """Overwrite the columns given, in some rows."""
        for name, new in values.items():
            if name not in self.columns:
                absent = torch.full((self._n,), MISSING[new.type], dtype=DTYPES[new.type])
                self.columns[name] = Column(new.type, absent)
            self.columns[name].put(index, new.items)

    def keep(self, index: torch.Tensor) -> None:
        """Keep these rows alone, in this order."""
        for column in self.columns.values():
            column.keep(index)
        self._n = len(index)

    def select(self, index: torch.Tensor) -> dict[str, list[Any]]:
        """Return some rows as columns, which `check` takes."""
        return {name: column.items(index) for name, column in self.columns.items()}

    def rows(self, index: torch.Tensor) -> list[dict[str, Any]]:
        """Return some rows, each without the columns it misses."""
        columns = self.select(index)
        return [
            {name: items[i] for name, items in columns.items() if items[i] is not None}
            for i in range(len(index))
        ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors, for a file."""
        found: dict[str, torch.Tensor] = {}
        for i, column in enumerate(self.columns.values()):
            found[f"column{i}"] = torch.from_numpy(column.rows)
            if column.type == "string":
                words = Texts()
                words.append([word.encode() for word in column.words])
                found |= {f"column{i}_text": words.data, f"column{i}_ends": words.ends}
        return found

    def settings(self) -> list[list[str]]:
        """Return what a file's header says: name and type of each column."""
        return [[name, column.type] for name, column in self.columns.items()]

    @classmethod
    def load(cls, settings: Any, tensors: Mapping[str, torch.Tensor], n: int) -> Table:
        """Return the table of n rows that `settings` and `tensors` gave.

        Raises:
            FormatError: if a column is not of its type or does not have n rows.
        """
        columns = {}
        for i, entry in enumerate(settings):
            name, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
            if not isinstance(name, str) or not isinstance(kind, str) or kind not in DTYPES:
                raise FormatError(
                    f"column {i} must be a name and one of {', '.join(DTYPES)}; got {entry!r:.80}"
                )
            rows, words = tensors[f"column{i}"], None
            if rows.dtype != DTYPES[kind] or rows.shape != (n,):
                raise FormatError(
                    f"column {name!r} must be {DTYPES[kind]} of shape ({n},); got {rows.dtype} of "
                    f"shape {tuple(rows.shape)}"
                )
            if kind == "string":
                words = Texts(tensors[f"column{i}_text"], tensors[f"column{i}_ends"])
            columns[name] = Column(kind, rows, words)
        return cls(columns, n)


def _by_column(rows: Any, n: int) -> dict[str, list[Any]]:
    if isinstance(rows, str) or not isinstance(rows, Sequence) or len(rows) != n:
        raise InputError(
            f"metadata must be one mapping for each of the {n} vectors, or a mapping from column "
            f"to {n} values; got {type(rows).__name__}"
            + (f" of length {len(rows)}" if isinstance(rows, Sequence) else "")
        )
    columns: dict[str, list[Any]] = {}
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"metadata[{i}] must map columns to values; got {row!r}")
        for name, value in row.items():
            columns.setdefault(name, [None] * n)[i] = value
    return columns


def _values(name: str, values: Any, n: int, known: Type | None) -> Values | None:
    """Return checked values of a column; None for an unknown column without any."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"column {name!r} must have {n} values; got {values!r}")
    items = values.tolist() if isinstance(values, np.ndarray | torch.Tensor) else list(values)
    if len(items) != n:
        raise InputError(f"column {name!r} must have {n} values; got {len(items)}")
    items = [value.item() if isinstance(value, np.generic) else value for value in items]
    items = [None if isinstance(value, float) and value != value else value for value in items]
    types = {_type_of(name, i, value) for i, value in enumerate(items) if value is not None}
    if known is None and not types:
        return None
    kind = known or ("float64" if types == {"int64", "float64"} else min(types))
    for wrong in sorted(types - {kind}):
        if (kind, wrong) != ("float64", "int64"):
            i = next(
                i for i, v in enumerate(items) if v is not None and _type_of(name, i, v) == wrong
            )
            raise InputError(f"column {name!r} holds {kind}; row {i} has {items[i]!r}, {wrong}")
    if kind == "float64":
        items = [_float(name, value) for value in items]
    return Values(kind, items)


def _type_of(name: str, row: int, value: Any) -> Type:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if not -(2**63) < value < 2**63:
            raise InputError(f"column {name!r} row {row}: {value} is not an int64; use a string")
        return "int64"
    if isinstance(value, float):
        return "float64"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"column {name!r} row {row}: not valid Unicode: {error.reason}"
            ) from error
        return "string"
    raise InputError(
        f"column {name!r} row {row}: a value is an integer, a float, a bool, a string or None; got "
        f"{type(value).__name__}"
    )


def _float(name: str, value: Any) -> float | None:
    if isinstance(value, int) and abs(value) > EXACT:
        raise InputError(f"column {name!r} holds float64, where {value} is not exact; use strings")
    return None if value is None else float(value)
