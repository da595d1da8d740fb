"""What an index knows of its rows besides their codes: ids and metadata.

It follows the rows: what is appended, moved and cut there is so here. Of a batch it makes tensors
that travel with the rows (`rows.Parts`) into logs and other indexes:

    id_text, id_ends    string ids: UTF-8 and where each ends
    metadata            columns, as the bytes of JSON
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from quantforge.errors import InputError
from quantforge.vectordb.checks import rows_of_bitmap
from quantforge.vectordb.ids import Ids, Parsed
from quantforge.vectordb.rows import Growing, Parts
from quantforge.vectordb.table import Metadata, Table, Values
from quantforge.vectordb.texts import Texts
from quantforge.vectordb.where import matching


class Catalog:
    """Ids and metadata of rows.

    Args:
        keys: of the ids, a part of the rows.
        ids: what is known of them; None to begin with.
        table: metadata; None for none.
    """

    def __init__(self, keys: Growing, ids: Ids | None = None, table: Table | None = None) -> None:
        self.ids = Ids(keys) if ids is None else ids
        self.table = Table(n=len(keys.rows)) if table is None else table

    @classmethod
    def empty(cls) -> Catalog:
        """Return the catalog of no rows."""
        return cls(Growing(torch.empty(0, dtype=torch.int64)))

    @property
    def report(self) -> dict[str, int]:
        """Bytes held by part; the keys of ids are with the rows."""
        return {"ids": self.ids.nbytes, "metadata": self.table.nbytes}

    def check(self, ids: Any, metadata: Metadata | None, n: int) -> dict[str, torch.Tensor]:
        """Return the parts `ids`, and what else there is of n new rows.

        Raises:
            InputError: for ids or metadata that do not fit.
        """
        new = self.ids.check_new(ids, n)
        return {"ids": new.keys, **_parts(new.text, self.table.check(metadata, n))}

    def check_update(self, metadata: Metadata | None, n: int) -> dict[str, torch.Tensor]:
        """Return the parts of new metadata of n rows."""
        return _parts(None, self.table.check(metadata, n))

    def check_other(self, other: Catalog) -> None:
        """Refuse the rows of another catalog that could not be appended.

        Raises:
            InputError: for an id that is in both, ids of another kind, or columns of another type.
        """
        rows = torch.arange(len(other.ids))
        names: Any = other.ids.names(rows)
        self.check(names, other.table.select(rows), len(rows))

    def allowed(self, ids: Any, bitmap: Any, where: Any) -> torch.Tensor | None:
        """Return the rows that a filter lets pass, rising, or None for all.

        Raises:
            InputError: for more than one filter, or one that does not fit.
        """
        if sum(given is not None for given in (ids, bitmap, where)) > 1:
            raise InputError("give a filter as ids, as bitmap or as where: one of them")
        if ids is not None:
            return self.ids.rows_of(ids).sort().values
        if bitmap is not None:
            left = self.ids.left
            return left[rows_of_bitmap(bitmap, len(left))]
        if where is not None:
            rows = torch.from_numpy(np.flatnonzero(matching(where, self.table)))
            return rows[self.ids.removed.hide(rows) >= 0]
        return None

    def append(self, parts: Parts) -> None:
        """Take in parts that `check` or `parts` made, after the rows have."""
        text = None
        if "id_text" in parts:
            texts = Texts(parts["id_text"], parts["id_ends"])
            text = [name.encode() for name in texts.at(torch.arange(len(texts)))]
        self.ids.append(Parsed(parts["ids"], text))
        self.table.append(_values(parts), len(parts["ids"]))

    def put(self, index: torch.Tensor, parts: Parts) -> None:
        """Overwrite the metadata of rows, if the parts have any."""
        self.table.put(index, _values(parts))

    def keep(self, index: torch.Tensor) -> None:
        """Keep these rows alone, in this order, after the rows have done so."""
        self.ids.keep(index)
        self.table.keep(index)

    def parts(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what there is of some rows, besides the keys."""
        values = self.table.check(self.table.select(index), len(index))
        return _parts(self.ids.text(index), values)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors but the keys, for a file."""
        return {**self.ids.tensors(), **self.table.tensors()}

    def settings(self) -> dict[str, Any]:
        """Return what a file's header says."""
        return {"ids": self.ids.settings(), "columns": self.table.settings()}

    @classmethod
    def load(
        cls, keys: Growing, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Catalog:
        """Return what `tensors` and `settings` gave.

        Raises:
            FormatError: if parts do not fit each other.
        """
        ids = Ids.load(keys, settings["ids"], tensors)
        return cls(keys, ids, Table.load(settings["columns"], tensors, len(keys.rows)))


def named(parts: Parts) -> np.ndarray:
    """Return the ids (n,) of parts, int64 or strings, as they were given."""
    if "id_text" not in parts:
        return parts["ids"].numpy()
    found = Texts(parts["id_text"], parts["id_ends"]).at(torch.arange(len(parts["ids"])))
    return np.array(found, dtype=object)


def _parts(text: list[bytes] | None, values: Mapping[str, Values]) -> dict[str, torch.Tensor]:
    found = {}
    if text is not None:
        texts = Texts()
        texts.append(text)
        found = {"id_text": texts.data, "id_ends": texts.ends}
    if values:
        said = json.dumps({name: [v.type, v.items] for name, v in values.items()}).encode()
        found["metadata"] = torch.from_numpy(np.frombuffer(said, np.uint8).copy())
    return found


def _values(parts: Parts) -> dict[str, Values]:
    if "metadata" not in parts:
        return {}
    said = json.loads(parts["metadata"].numpy().tobytes())
    return {name: Values(kind, items) for name, (kind, items) in said.items()}
