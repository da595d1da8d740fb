"""Rows of an index: everything that is held of each vector, by name, in buffers that grow.

packed0, packed1, ...   (n, row_bytes) uint8, codes of a group of directions
scales                  (n, 1) fp16
offsets                 (n,) fp16
ids                     (n,) int64
originals               vectors that are kept (`originals`), or
places                  (n,) int64, where they are in their file
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantforge.vectordb.codec import Coded
from quantforge.vectordb.mapped import with_room

GROWTH = 1.25
FILE_ROOM = 4
"""Times the room that other buffers would have: addresses cost nothing."""

Parts = Mapping[str, torch.Tensor]
"""What belongs to some rows, by name; the first axis of each is the row."""


class Growing:
    """Rows (n, ...) of one dtype in a buffer with room for more.

    Rows of a file that is mapped stay in it when others are added or overwritten.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self._buffer, self._count = rows, len(rows)
        self._is_own = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Growing:
        found = Growing(self.rows.clone())
        found._is_own = True
        return found

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> torch.Tensor:
        """The rows, a view."""
        return self._buffer[: self._count]

    @property
    def nbytes(self) -> int:
        """Bytes held; spare room of a buffer in main memory takes none until it is used."""
        return (self.rows if self._buffer.device.type == "cpu" else self._buffer).nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self._buffer.shape[1:].numel() * self._buffer.element_size()

    def append(self, rows: torch.Tensor) -> None:
        """Add rows at the end."""
        count = self._count + len(rows)
        if count > len(self._buffer):
            room = max(count, int(GROWTH * self._count))
            bigger = None if self._is_own else with_room(self.rows, FILE_ROOM * room)
            if bigger is None:
                bigger = self._buffer.new_empty((room, *self._buffer.shape[1:]))
                bigger[: self._count] = self.rows
            self._buffer, self._is_own = bigger, True
        self._buffer[self._count : count] = rows
        self._count = count

    def put(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Overwrite rows; a buffer that is a file's stays as it is there."""
        if not self._is_own:  # writing to the pages of a file would forbid to map them anew
            bigger = with_room(self.rows, FILE_ROOM * self._count)
            self._buffer, self._is_own = self._buffer if bigger is None else bigger, True
        self._buffer[index] = rows.to(self._buffer.device)

    def to(self, device: torch.device) -> None:
        """Move the rows, without spare room."""
        if self._buffer.device != device:
            self._buffer, self._is_own = self.rows.to(device), True

    def keep(self, index: torch.Tensor) -> None:
        """Keep these rows alone, in this order, without spare room."""
        self._buffer = self.rows[index]
        self._count, self._is_own = len(index), True


class Rows:
    """All that an index holds of its vectors, row by row.

    Args:
        parts: tensors by name, one row for each vector; those of no vectors fix the dtypes.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = {name: Growing(part) for name, part in parts.items()}

    def __len__(self) -> int:
        return len(self._parts["ids"])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._parts[name].rows

    def growing(self, name: str) -> Growing:
        """Return the buffer of a part, for those who follow it."""
        return self._parts[name]

    def exchange(self, name: str, other: str, rows: torch.Tensor) -> None:
        """Hold another part in the place of one."""
        del self._parts[name]
        self._parts[other] = Growing(rows)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    @property
    def ids(self) -> torch.Tensor:
        """Ids (n,) int64, in the order of rows."""
        return self["ids"]

    def parts(self, index: slice | torch.Tensor) -> dict[str, torch.Tensor]:
        """Return everything of some rows."""
        return {name: part.rows[index] for name, part in self._parts.items()}

    def coded(self, index: slice | torch.Tensor) -> Coded:
        """Return the codes of some rows."""
        return Coded.of({name: self[name][index] for name in self._parts if is_code(name)})

    def to(self, device: torch.device) -> None:
        """Move the codes; ids and vectors that are kept stay in main memory."""
        for name, part in self._parts.items():
            if is_code(name):
                part.to(device)

    @property
    def row_bytes(self) -> int:
        """Bytes of what is stored of one row."""
        return sum(part.row_bytes for part in self._parts.values())

    def report(self) -> dict[str, int]:
        """Return the bytes held by part."""
        held = {"codes": 0, "scales": 0, "ids": 0, "originals": 0}
        for name, part in self._parts.items():
            name = "codes" if name.startswith("packed") else name
            name = "scales" if name == "offsets" else name
            held[name] = held.get(name, 0) + part.nbytes
        return held

    def append(self, parts: Parts) -> None:
        """Add rows; `parts` has the names of this."""
        for name, part in self._parts.items():
            part.append(parts[name])

    def put(self, index: torch.Tensor, parts: Parts) -> None:
        """Overwrite the parts given of some rows."""
        for name, part in parts.items():
            self._parts[name].put(index, part)

    def keep(self, index: torch.Tensor) -> None:
        """Keep these rows alone, in this order."""
        for part in self._parts.values():
            part.keep(index)


def is_code(name: str) -> bool:
    """Whether a part belongs to `Coded`."""
    return name.startswith("packed") or name in ("scales", "offsets")
