"""Ids of an index, integers or strings: from rows to ids and back.

    key     of a row, int64: an integer id itself; of a string 8 bytes of the BLAKE2b of its UTF-8
    run     a range of rows and their order by key; none is held where keys rise as they lie

An id is found by bisection of the keys in each run. If it has been removed and added again, its
last row counts. Runs are made when an id is first looked for,
and merged so that each is more than twice as long as the next: there are few, however small the
batches that are added. A string is compared in full with the one that has its key.

The order that a file says is checked when an id is first looked for, not when the file is opened:
that reads all keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from quantforge.errors import FormatError, InputError
from quantforge.vectordb.checks import ids_of
from quantforge.vectordb.id_order import check_order
from quantforge.vectordb.removed import Removed
from quantforge.vectordb.rows import Growing
from quantforge.vectordb.texts import Texts

Kind = Literal["integer", "string"]
MAX_ID = 2**63 - 1


@dataclass(frozen=True)
class Parsed:
    """Distinct ids that a caller gave.

    Attributes:
        keys: (n,) int64.
        text: UTF-8 of each, or None for integers.
    """

    keys: torch.Tensor
    text: list[bytes] | None

    @property
    def kind(self) -> Kind:
        """What they are."""
        return "integer" if self.text is None else "string"

    def name(self, i: int) -> int | str:
        """Return the id as the caller gave it."""
        return int(self.keys[i]) if self.text is None else self.text[i].decode()


@dataclass(frozen=True)
class Run:
    """Rows from start to stop, and their order by key relative to start."""

    start: int
    stop: int
    order: torch.Tensor | None

    def find(self, keys: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Return the last rows (m,) of wanted keys (m,), -1 where the run has none."""
        count = self.stop - self.start
        if self.order is None:
            place = torch.searchsorted(keys[self.start : self.stop], wanted)
            rows = self.start + place.clamp_max(count - 1)
        else:
            low, high = torch.zeros_like(wanted), torch.full_like(wanted, count - 1)
            for _ in range(count.bit_length()):
                middle = (low + high + 1) >> 1
                more = keys[self.start + self.order[middle].long()] > wanted
                low = torch.where(more, low, middle)
                high = torch.where(more & (low < high), middle - 1, high)
            rows = self.start + self.order[low].long()
        return torch.where(keys[rows] == wanted, rows, -1)


class Ids:
    """The ids of rows (n,), all integers or all strings: the first that are added decide.

    Args:
        keys: (n,) int64, which somebody else appends to and cuts.
        texts: of string ids.
        order: rows by key, if that is known already and keys do not rise.
        rising: keys rise with the row.
        next_id: what follows the greatest integer that was ever there.
    """

    def __init__(
        self,
        keys: Growing,
        texts: Texts | None = None,
        order: torch.Tensor | None = None,
        *,
        rising: bool = False,
        next_id: int = 0,
    ) -> None:
        self._keys, self._texts, self.next_id = keys, texts, next_id
        self.removed = Removed()
        known = len(self) > 0 and (rising or order is not None)
        self._runs: tuple[Run, ...] = (Run(0, len(self), order),) if known else ()
        self._unchecked = known

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def kind(self) -> Kind:
        """What the ids are."""
        return "integer" if self._texts is None else "string"

    @property
    def nbytes(self) -> int:
        """Bytes held besides the keys, spare room included."""
        orders = sum(run.order.nbytes for run in self._runs if run.order is not None)
        return orders + (0 if self._texts is None else self._texts.nbytes)

    def names(self, rows: torch.Tensor) -> np.ndarray:
        """Return the ids of rows of any shape; where a row is -1 the id is -1, or None."""
        if self._texts is None:
            where = rows.numpy()
            if not len(self) or not where.size:
                return where
            found = self._keys.rows.numpy()[where]
            return found if where.min() >= 0 else np.where(where >= 0, found, -1)
        named = np.full(rows.numel(), None, dtype=object)
        there = rows.flatten() >= 0
        named[there.numpy()] = self._texts.at(rows.flatten()[there])
        return named.reshape(tuple(rows.shape))

    def parse(self, ids: Any, n: int | None = None) -> Parsed:
        """Read ids, an array or a list of integers or of strings.

        Raises:
            InputError: for another type, another count than n, or an id that is there twice.
        """
        items = ids.tolist() if isinstance(ids, np.ndarray) and ids.dtype.kind in "UO" else ids
        if not isinstance(items, list | tuple) or not any(isinstance(i, str) for i in items):
            return Parsed(ids_of(ids, n), None)
        return _parse_strings(items, n)

    def check_new(self, ids: Any, n: int) -> Parsed:
        """Return the ids of n rows to be added; numbered on from the greatest if None.

        Raises:
            InputError: for ids that do not fit, are of the other kind, or are there already.
        """
        if ids is None and self.kind == "string" and len(self):
            raise InputError("the index has string ids; give one for each vector")
        if ids is None:
            if self.next_id + n > MAX_ID:
                raise InputError(f"there are no ids after {self.next_id - 1}; give your own")
            return Parsed(torch.arange(self.next_id, self.next_id + n), None)
        new = self.parse(ids, n)
        if not len(self):
            return new
        there = self._find(new)
        if bool((there >= 0).any()):
            taken = new.name(int((there >= 0).nonzero()[0]))
            raise InputError(f"id {taken!r} is in the index; use update([{taken!r}], ...)")
        if new.text is not None:
            self._refuse_collisions(new)
        return new

    def append(self, new: Parsed) -> None:
        """Take in what `check_new` returned, after its keys have been appended."""
        if not len(new.keys):
            return
        if len(self) == len(new.keys):
            self._texts, self._runs = (None if new.text is None else Texts()), ()
        if self._texts is not None:
            assert new.text is not None, "check_new has looked"
            self._texts.append(new.text)
        else:
            self.next_id = max(self.next_id, int(new.keys.max()) + 1)

    def text(self, rows: torch.Tensor) -> list[bytes] | None:
        """Return the UTF-8 of string ids, None for integers."""
        return None if self._texts is None else [t.encode() for t in self._texts.at(rows)]

    @property
    def left(self) -> torch.Tensor:
        """Rows that are not removed, rising."""
        return self.removed.left(len(self))

    def rows_of(self, ids: Any, n: int | None = None) -> torch.Tensor:
        """Return the rows (m,) int64 of ids (m,), n of them if that is given.

        Raises:
            InputError: for ids of the wrong kind, twice the same, or one that is not there.
        """
        wanted = self.parse(ids, n)
        rows = self._find(wanted) if len(self) else torch.full_like(wanted.keys, -1)
        if bool((rows < 0).any()):
            unknown = wanted.name(int((rows < 0).nonzero()[0]))
            raise InputError(f"id {unknown!r} is not in the index")
        return rows

    def keep(self, index: torch.Tensor) -> None:
        """Follow the keys, of which these rows alone were kept; none of them is removed."""
        rising = bool((index[1:] > index[:-1]).all())
        moved = [_moved(run, index) for run in self._known()] if rising else []
        self._runs = tuple(run for run in moved if run.stop > run.start)
        self._unchecked = False  # an order that a file says is gone now, or was checked
        if self._texts is not None:
            self._texts.keep(index)
        self.removed = Removed()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors but the keys, for a file."""
        found = {}
        order = self._whole().order if len(self) else None
        if order is not None:
            found["id_order"] = order
        if self._texts is not None:
            found |= {"id_text": self._texts.data, "id_ends": self._texts.ends}
        return found

    def settings(self) -> dict[str, Any]:
        """Return what a file's header says of them."""
        return {"kind": self.kind, "next": self.next_id}

    @classmethod
    def load(
        cls, keys: Growing, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Ids:
        """Return ids as `tensors` and `settings` gave them; nothing is read but what is asked for.

        Raises:
            FormatError: if parts do not fit each other. Later, by whatever asks for an id or saves,
                if `id_order` is not the order of the keys.
        """
        order, texts = tensors.get("id_order"), None
        if settings["kind"] == "string":
            texts = Texts(tensors["id_text"], tensors["id_ends"])
        for name, part in (("id_order", order), ("id_ends", None if texts is None else texts.ends)):
            if part is not None and part.shape != keys.rows.shape:
                raise FormatError(f"{name} has {len(part)} rows, ids has {len(keys.rows)}")
            if part is not None and part.dtype not in (torch.int32, torch.int64):
                raise FormatError(f"{name} must be int32 or int64; got {part.dtype}")
        return cls(keys, texts, order, rising=order is None, next_id=settings["next"])

    # ---- inside -----------------------------------------------------------------------------

    def _find(self, wanted: Parsed) -> torch.Tensor:
        """Return rows (m,), -1 where there is none."""
        if len(wanted.keys) and wanted.kind != self.kind:
            raise InputError(f"the index has {self.kind} ids; got {wanted.kind}s")
        rows = self._rows_of_keys(wanted.keys)
        if self._texts is None or wanted.text is None:
            return rows
        there = (rows >= 0).nonzero()[:, 0]
        for i, text in zip(there.tolist(), self._texts.at(rows[there]), strict=True):
            if wanted.text[i] != text.encode():
                rows[i] = -1
        return rows

    def _rows_of_keys(self, keys: torch.Tensor) -> torch.Tensor:
        rows = torch.full_like(keys, -1)
        for run in self._indexed():
            found = self.removed.hide(run.find(self._keys.rows, keys))
            rows = torch.where(rows < 0, found, rows)
        return rows

    def _refuse_collisions(self, new: Parsed) -> None:
        rows = self._rows_of_keys(new.keys)
        if bool((rows >= 0).any()):
            i = int((rows >= 0).nonzero()[0])
            other = self.names(rows[i : i + 1])[0]
            raise InputError(f"ids {new.name(i)!r} and {other!r} have one hash; rename one of them")

    def _indexed(self) -> tuple[Run, ...]:
        """Return runs of all rows; what is new becomes a run, and joins those not much longer."""
        runs = list(self._known())
        start = runs[-1].stop if runs else 0
        if start == len(self):
            return self._runs
        stop = len(self)
        while runs and runs[-1].stop - runs[-1].start <= 2 * (stop - start):
            start = runs.pop().start
        self._runs = (*runs, self._sorted(start, stop))  # at once: other threads may search
        return self._runs

    def _known(self) -> tuple[Run, ...]:
        if self._unchecked:
            check_order(self._keys.rows[: self._runs[0].stop], self._runs[0].order)
            self._unchecked = False
        return self._runs

    def _whole(self) -> Run:
        runs = self._indexed()
        if len(runs) > 1:
            self._runs = runs = (self._sorted(0, len(self)),)
        return runs[0]

    def _sorted(self, start: int, stop: int) -> Run:
        keys = self._keys.rows[start:stop]
        if bool((keys[1:] > keys[:-1]).all()):
            return Run(start, stop, None)
        return _run_of(start, keys.argsort(stable=True))


def _moved(run: Run, index: torch.Tensor) -> Run:
    """Return a run of which the rows of index (rising) are left."""
    bounds = torch.tensor([run.start, run.stop])
    start, stop = torch.searchsorted(index, bounds).tolist()
    if run.order is None:
        return Run(start, stop, None)
    place = torch.full((run.stop - run.start,), -1)
    place[index[start:stop] - run.start] = torch.arange(stop - start)
    moved = place[run.order.long()]
    return _run_of(start, moved[moved >= 0])


def _run_of(start: int, order: torch.Tensor) -> Run:
    stop = start + len(order)
    if bool((order[1:] > order[:-1]).all()):
        return Run(start, stop, None)
    return Run(start, stop, order.to(torch.int32) if len(order) < 2**31 else order)


def _parse_strings(items: list[Any] | tuple[Any, ...], n: int | None) -> Parsed:
    if n is not None and len(items) != n:
        raise InputError(f"there must be one id for each of the {n} vectors; got {len(items)}")
    text = [_encoded(item) for item in items]
    hashes = b"".join([hashlib.blake2b(part, digest_size=8).digest() for part in text])
    keys = torch.from_numpy(np.frombuffer(hashes, "<i8").astype(np.int64))
    ordered, order = keys.sort()
    same = (ordered[1:] == ordered[:-1]).nonzero()
    if len(same):
        first, second = (text[int(order[int(same[0]) + i])].decode() for i in (0, 1))
        if first == second:
            raise InputError(f"id {first!r} is given twice; ids must be distinct")
        raise InputError(f"ids {first!r} and {second!r} have one hash; rename one of them")
    return Parsed(keys, text)


def _encoded(item: Any) -> bytes:
    if not isinstance(item, str) or not item:
        raise InputError(f"ids must be all integers or all non-empty strings; got {item!r}")
    try:
        return item.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"id {item!r} is not valid Unicode: {error.reason}") from error
