"""What changes an index: rows as they are stored, made first and taken in afterwards.

A commit is a list of changes that take effect together. Its bytes are those of a safetensors file:
arrays `0.ids`, `0.scales`, ..., `1.ids`, ... and, in the header, what each change is:

    {"changes": "[{\"kind\": \"add\"}, {\"kind\": \"remove\"}]"}

Which arrays there are is the index's affair, so it can hold more of a vector one day.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from quantforge.errors import FormatError
from quantforge.vectordb import intake
from quantforge.vectordb.index import QuantizedIndex
from quantforge.vectordb.table import Metadata

Kind = Literal["add", "update", "remove"]


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        kind: what is done with the rows.
        parts: tensors by name, as the index takes them in; `ids` (keys of string ids) is always
            there.
    """

    kind: Kind
    parts: dict[str, torch.Tensor]


def added(index: QuantizedIndex, vectors: Any, ids: Any, metadata: Metadata | None) -> Change:
    """Return what `index.add` would do; raises what it raises, and changes nothing."""
    parts, _ = intake.prepare(index, index._vectors(vectors), ids, metadata)
    return Change("add", parts)


def updated(index: QuantizedIndex, ids: Any, vectors: Any, metadata: Metadata | None) -> Change:
    """Return what `index.update` would do; raises what it raises, and changes nothing."""
    _, parts = intake.prepare_update(index, ids, vectors, metadata)
    return Change("update", parts)


def removed(index: QuantizedIndex, ids: Any) -> Change:
    """Return what `index.remove_ids` would do; raises what it raises, and changes nothing."""
    rows = index._rows_of(ids)
    return Change("remove", {"ids": index._known.rows.ids[rows] if len(rows) else rows})


def apply(index: QuantizedIndex, change: Change) -> None:
    """Take in a change that was made for this index as it is now."""
    ids = change.parts["ids"]
    if not len(ids):
        return
    core = index._known
    if change.kind == "add":
        core.append(change.parts)
    elif change.kind == "update":
        core.replace(core.catalog.ids._rows_of_keys(ids), change.parts)
    else:
        core.remove(core.catalog.ids._rows_of_keys(ids))


def encode(changes: Sequence[Change]) -> bytes:
    """Return the bytes of a commit."""
    arrays = {
        f"{i}.{name}": np.ascontiguousarray(part.cpu().numpy())
        for i, change in enumerate(changes)
        for name, part in change.parts.items()
    }
    kinds = [{"kind": change.kind} for change in changes]
    return save(arrays, metadata={"changes": json.dumps(kinds)})


def decode(data: bytes, where: str) -> list[Change]:
    """Return the changes of a commit.

    Args:
        data: what `encode` returned.
        where: the file and offset, for messages.

    Raises:
        FormatError: if it is not a commit, or one of a later version.
    """
    try:
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        kinds = [entry["kind"] for entry in json.loads(header["__metadata__"]["changes"])]
        parts: list[dict[str, torch.Tensor]] = [{} for _ in kinds]
        for key, array in arrays.items():
            place, _, name = key.partition(".")
            parts[int(place)][name] = torch.from_numpy(array)
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        raise FormatError(f"{where} is no commit of an index: {error!r}") from error
    if unknown := sorted(set(kinds) - set(get_args(Kind))):
        raise FormatError(f"{where}: changes {unknown} are unknown; upgrade quantforge")
    return [Change(kind, part) for kind, part in zip(kinds, parts, strict=True)]
