"""Ids against a dictionary: whatever is added, removed and moved, they are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantforge.errors import FormatError, InputError
from quantforge.vectordb import id_order
from quantforge.vectordb import ids as ids_module
from quantforge.vectordb.ids import Ids
from quantforge.vectordb.rows import Growing

KINDS = ("integer", "string")


class Held(Ids):
    """Ids beside the keys that an index would hold."""

    def __init__(self) -> None:
        self.held = Growing(torch.empty(0, dtype=torch.int64))
        super().__init__(self.held)

    def take(self, values: Any, n: int) -> None:
        new = self.check_new(values, n)
        self.held.append(new.keys)
        self.append(new)

    def keep(self, index: torch.Tensor) -> None:
        self.held.keep(index)
        super().keep(index)

    def reopened(self) -> Held:
        found = Held()
        found.held.append(self.held.rows)
        vars(found).update(vars(Ids.load(found.held, self.settings(), self.tensors())))
        return found


def add(ids: Held, values: Any) -> None:
    ids.take(values, len(values))


def named(kind: str, number: int) -> int | str:
    return number if kind == "integer" else f"doc/{number}é"


def check(ids: Held, expected: list[Any]) -> None:
    assert len(ids) == len(expected)
    rows = torch.arange(len(expected))
    assert ids.names(rows).tolist() == expected
    if expected:
        mixed = torch.from_numpy(np.random.RandomState(0).permutation(len(expected)))
        assert ids.rows_of([expected[i] for i in mixed]).tolist() == mixed.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_ids_are_found_whatever_happened_before(kind: str, seed: int) -> None:
    random = np.random.RandomState(seed)
    numbers = random.permutation(400).tolist()
    ids, expected = Held(), []
    for step in random.choice(("add", "add", "keep", "file"), 12):
        if step == "add":
            size = random.randint(0, 30)
            batch, numbers = numbers[:size], numbers[size:]
            add(ids, [named(kind, i) for i in batch])
            expected += [named(kind, i) for i in batch]
        elif step == "keep":
            index = random.permutation(len(expected))[: random.randint(0, len(expected) + 1)]
            index = np.sort(index) if random.randint(2) else index
            ids.keep(torch.from_numpy(index))
            expected = [expected[i] for i in index]
        else:
            ids = ids.reopened()
        if random.randint(2):
            check(ids, expected)
    check(ids, expected)


def test_ids_that_rise_need_no_order() -> None:
    ids = Held()
    for start in range(0, 1000, 100):
        ids.take(None, 100)
        ids.rows_of([start])
    ids.keep(torch.arange(0, 1000, 2))
    assert ids.rows_of([998]).tolist() == [499]
    assert not ids.tensors()
    assert ids.check_new(None, 1).keys.tolist() == [1000]


def test_small_batches_make_few_runs() -> None:
    ids = Held()
    for number in np.random.RandomState(1).permutation(150):
        add(ids, [int(number)])
        ids.rows_of([int(number)])
    assert len(ids._indexed()) < 10
    assert ids.nbytes <= 150 * 4


def test_a_file_is_searched_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = Held()
    add(ids, [int(i) for i in np.random.RandomState(2).permutation(1000)])
    loaded = ids.reopened()
    monkeypatch.setattr(torch.Tensor, "argsort", None)
    wanted = int(ids.names(torch.tensor([5]))[0])
    assert loaded.rows_of([wanted]).tolist() == [5]
    with pytest.raises(FormatError, match="id_order has 999 rows, ids has 1000"):
        Ids.load(ids.held, ids.settings(), ids.tensors() | {"id_order": torch.zeros(999)})


def swapped(order: torch.Tensor) -> torch.Tensor:
    return order[[*range(500), 501, 500, *range(502, 1000)]]


DAMAGED_ORDERS = {
    "swapped": (swapped, r"ids in the order of id_order must rise; got 501 before 500"),
    "twice": (lambda o: torch.cat([o[:1], o[:-1]]), "must rise; got 0 before 0"),
    "beyond": (lambda o: torch.cat([o[:-1], o.new_full((1,), 1000)]), r"0 to 999; got \d+ to 1000"),
    "negative": (lambda o: torch.cat([o.new_full((1,), -1), o[1:]]), r"0 to 999; got -1 to \d+"),
    "none": (lambda o: None, "ids without id_order must rise"),
}


@pytest.mark.parametrize("chunk", [8, 501, 4096])
@pytest.mark.parametrize("name", DAMAGED_ORDERS)
def test_a_damaged_order_is_refused_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    monkeypatch.setattr(id_order, "CHUNK_ROWS", chunk)
    damage, message = DAMAGED_ORDERS[name]
    ids = Held()
    add(ids, [int(i) for i in np.random.RandomState(2).permutation(1000)])
    order = damage(ids.tensors()["id_order"])
    tensors = {} if order is None else {"id_order": order}
    uses = (
        lambda found: found.rows_of([7]),
        lambda found: found.check_new([1000], 1),
        lambda found: found.tensors(),
        lambda found: found.keep(torch.arange(10)),
    )
    found = Ids.load(ids.held, ids.settings(), tensors)
    for use in (*uses, *uses):  # refused again, too
        with pytest.raises(FormatError, match=message):
            use(found)
    with pytest.raises(FormatError, match=r"id_order must be int32 or int64; got torch.float32"):
        Ids.load(ids.held, ids.settings(), {"id_order": torch.zeros(1000)})


def test_absent_rows_have_no_name() -> None:
    rows = torch.tensor([[0, -1], [1, 0]])
    numbers, texts = Held(), Held()
    add(numbers, [7, 8])
    add(texts, np.array(["a", "b"]))
    assert numbers.names(rows).tolist() == [[7, -1], [8, 7]]
    assert texts.names(rows).tolist() == [["a", None], ["b", "a"]]
    assert Held().names(torch.tensor([-1])).tolist() == [-1]


BAD = {
    "unknown": (lambda i: i.rows_of(["a", "nine"]), "id 'nine' is not in the index"),
    "twice": (lambda i: add(i, ["x", "y", "x"]), "id 'x' is given twice"),
    "there": (lambda i: add(i, ["x", "b"]), r"id 'b' is in the index; use update\(\['b'\]"),
    "numbered": (lambda i: i.check_new(None, 3), "give one for each vector"),
    "kind": (lambda i: add(i, [5, 6]), "the index has string ids; got integers"),
    "mixed": (lambda i: add(i, ["x", 6]), "all integers or all non-empty strings; got 6"),
    "empty": (lambda i: add(i, ["x", ""]), "got ''"),
    "count": (lambda i: i.check_new(["x"], 2), "each of the 2 vectors; got 1"),
    "surrogate": (lambda i: add(i, ["\ud800"]), "not valid Unicode"),
    "bytes": (lambda i: i.rows_of([b"a"]), "must be integers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_ids_are_named_and_change_nothing(name: str) -> None:
    call, message = BAD[name]
    ids = Held()
    add(ids, ["a", "b", "c"])
    with pytest.raises(InputError, match=message):
        call(ids)
    check(ids, ["a", "b", "c"])


def test_strings_with_one_hash_are_refused_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = Held()
    add(ids, ["a", "b"])

    class OneHash:
        def __init__(self, data: bytes, digest_size: int) -> None:
            pass

        def digest(self) -> bytes:
            return int(ids.held.rows[0]).to_bytes(8, "little", signed=True)

    monkeypatch.setattr(ids_module.hashlib, "blake2b", OneHash)
    with pytest.raises(InputError, match="'c' is not in the index"):
        ids.rows_of(["c"])
    with pytest.raises(InputError, match="'c' and 'a' have one hash"):
        add(ids, ["c"])
    with pytest.raises(InputError, match="have one hash"):
        add(ids, ["c", "d"])


def test_the_last_integer_can_be_used() -> None:
    ids = Held()
    add(ids, [2**63 - 1])
    assert ids.rows_of([2**63 - 1]).tolist() == [0]
    with pytest.raises(InputError, match="no ids after"):
        ids.check_new(None, 1)
