"""Metadata and filters against lists of dictionaries."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from quantforge.errors import FormatError, InputError
from quantforge.vectordb.table import Table
from quantforge.vectordb.where import COMPARISONS, matching

ROWS: list[dict[str, Any]] = [
    {"year": 2019, "lang": "en", "score": 0.5, "open": True},
    {"year": 2021, "lang": "de", "score": 1.5},
    {"year": 2020, "lang": "fr", "open": False},
    {"lang": "en", "score": -1.0, "open": True},
    {"year": 2020, "lang": "", "score": 0.5, "open": False},
    {},
]


def add(table: Table, metadata: Any, n: int) -> None:
    table.append(table.check(metadata, n), n)


def built(rows: list[dict[str, Any]] = ROWS) -> Table:
    table = Table()
    for part in (rows[:2], rows[2:]):
        add(table, part, len(part))
    return table


def found(where: Any, table: Table | None = None) -> list[int]:
    passing = matching(json.loads(json.dumps(where)), built() if table is None else table)
    return np.flatnonzero(passing).tolist()


def every(table: Table) -> list[dict[str, Any]]:
    return table.rows(torch.arange(len(table)))


def test_columns_and_rows_are_two_ways_to_say_it() -> None:
    table = Table()
    columns = {name: [row.get(name) for row in ROWS] for name in ("year", "lang", "open")}
    add(table, columns | {"score": np.array([0.5, 1.5, np.nan, -1, 0.5, np.nan])}, len(ROWS))
    assert every(table) == every(built()) == ROWS
    assert table.columns["year"].type == "int64"
    assert table.columns["open"].type == "bool"


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"year": 2020}, [2, 4]),
        ({"year": {"gte": 2020}, "lang": {"in": ["en", "de"]}}, [1]),
        ({"year": {"gt": 2019, "lt": 2021}}, [2, 4]),
        ({"year": {"lte": 2019.5}}, [0]),
        ({"year": {"in": [2019, 2021.0, 5.5, 10**40]}}, [0, 1]),
        ({"year": {"lt": 10**40}}, [0, 1, 2, 4]),
        ({"score": {"gt": -(10**400)}}, [0, 1, 3, 4]),
        ({"score": {"in": [0.5, -1]}}, [0, 3, 4]),
        ({"score": {"ne": 0.5}}, [1, 3]),
        ({"open": True}, [0, 3]),
        ({"open": {"in": [False]}}, [2, 4]),
        ({"open": {"ne": True}}, [2, 4]),
        ({"lang": {"gte": "en"}}, [0, 2, 3]),
        ({"lang": {"lt": "en"}}, [1, 4]),
        ({"lang": "unheard of"}, []),
        ({"lang": {"ne": "unheard of"}}, [0, 1, 2, 3, 4]),
        ({"lang": {"in": ["unheard of", ""]}}, [4]),
        ({"lang": {"in": []}}, []),
        ({"year": None}, [3, 5]),
        ({"year": {"exists": True}, "open": {"exists": False}}, [1]),
        ({"not": {"year": {"gte": 2020}}}, [0, 3, 5]),
        ({"or": [{"year": 2019}, {"lang": "de"}]}, [0, 1]),
        ({"or": []}, []),
        ({"and": [{"open": True}, {"not": {"score": {"lt": 0}}}], "lang": "en"}, [0]),
    ],
    ids=str,
)
def test_filters(where: Any, expected: list[int]) -> None:
    assert found(where) == expected


@pytest.mark.parametrize("seed", range(4))
def test_filters_are_those_of_python(seed: int) -> None:
    random = np.random.RandomState(seed)
    big = [2**53 + 1, -(2**63) + 1, 2**63 - 1, 0, 1, 2**53]
    values = {
        "i": [None if random.rand() < 0.2 else int(random.choice(big)) for _ in range(90)],
        "f": [None if random.rand() < 0.2 else float(random.randint(4)) / 2 for _ in range(90)],
        "s": [None if random.rand() < 0.2 else "abcd"[random.randint(4)] for _ in range(90)],
    }
    table = Table()
    add(table, values, 90)
    for name, operands in {
        "i": [*big, 0.5, 2.0**53],
        "f": [0, 0.5, 1],
        "s": ["a", "c", "x"],
    }.items():
        for operand in operands:
            for word, compare in COMPARISONS.items():
                expected = [
                    i for i, v in enumerate(values[name]) if v is not None and compare(v, operand)
                ]
                assert found({name: {word: operand}}, table) == expected, (name, word, operand)
        among = [i for i, v in enumerate(values[name]) if v in operands and v is not None]
        assert found({name: {"in": operands}}, table) == among


BAD_FILTERS = {
    "column": ({"yaer": 1}, r"where\['yaer'\].*columns are lang, open, score, year"),
    "operator": ({"year": {"above": 1}}, r"where\['year'\]\['above'\]: operators are eq, ne, .*in"),
    "type": ({"year": "2020"}, r"where\['year'\]: the column holds int64; got '2020', str"),
    "bool": ({"year": {"gt": True}}, "holds int64; got True, bool"),
    "list": ({"lang": {"in": ["en", 3]}}, r"\['in'\]\[1\]: the column holds string; got 3"),
    "no list": ({"lang": {"in": "en"}}, "must be a list of values"),
    "null": ({"lang": {"eq": None}}, "got None"),
    "order": ({"open": {"lt": True}}, "a bool column has no order"),
    "exists": ({"open": {"exists": 1}}, "must be true or false"),
    "or": ({"or": {"year": 1}}, r"where\['or'\] must be a list"),
    "no mapping": ({"and": [3]}, r"where\['and'\]\[0\] must map columns"),
}


@pytest.mark.parametrize("name", BAD_FILTERS)
def test_bad_filters_are_named(name: str) -> None:
    where, message = BAD_FILTERS[name]
    with pytest.raises(InputError, match=message):
        found(where)


def test_filters_have_a_depth() -> None:
    where: Any = {"year": 2020}
    for _ in range(500):
        where = {"not": where}
    with pytest.raises(InputError, match="32 deep"):
        found(where)
    with pytest.raises(InputError, match="got nan"):
        matching({"score": float("nan")}, built())


BAD_VALUES: dict[str, tuple[Any, str]] = {
    "type": ({"year": [1, "x"]}, "column 'year' holds int64; row 1 has 'x', string"),
    "float": ({"year": [1, 0.5]}, "holds int64; row 1 has 0.5, float64"),
    "mixed": ({"new": [1, True]}, "column 'new' holds"),
    "object": ({"new": [1, {}]}, "column 'new' row 1: a value is .* got dict"),
    "count": ({"year": [1]}, "column 'year' must have 2 values; got 1"),
    "string": ({"lang": "en"}, "must have 2 values; got 'en'"),
    "rows": ([{"year": 1}], "one mapping for each of the 2 vectors.* length 1"),
    "row": ([{"year": 1}, 3], r"metadata\[1\] must map columns"),
    "name": ([{"not": 1}, {}], "named by a string other than and, or, not; got 'not'"),
    "large": ({"year": [1, 2**63]}, f"row 1: {2**63} is not an int64"),
    "inexact": ({"score": [1, 2**53 + 1]}, "holds float64, where 9007199254740993 is not exact"),
    "surrogate": ({"lang": ["en", "\ud800"]}, "column 'lang' row 1: not valid Unicode"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_metadata_is_named(name: str) -> None:
    metadata, message = BAD_VALUES[name]
    with pytest.raises(InputError, match=message):
        built().check(metadata, 2)


@pytest.mark.parametrize("seed", range(4))
def test_rows_stay_with_their_metadata(seed: int) -> None:
    random, table, expected = np.random.RandomState(seed), Table(), []
    for step in random.choice(("add", "put", "keep", "file", "bare"), 25):
        n = len(expected)
        if step == "add":
            new = [ROWS[i] | {"word": str(random.randint(9))} for i in random.randint(0, 6, 3)]
            add(table, new, 3)
            expected += new
        elif step == "bare":
            add(table, None, 2)
            expected += [{}, {}]
        elif step == "put" and n:
            index = random.permutation(n)[:2]
            words = [f"new{i}" for i in index]
            table.put(torch.from_numpy(index), table.check({"word": words}, len(index)))
            for i, word in zip(index, words, strict=True):
                expected[i] = expected[i] | {"word": word}
        elif step == "keep":
            index = random.permutation(n)[: n - n // 3]
            table.keep(torch.from_numpy(index))
            expected = [expected[i] for i in index]
        elif step == "file":
            table = Table.load(table.settings(), table.tensors(), len(table))
        assert every(table) == expected
        assert len(table) == len(expected)


def test_strings_that_no_row_has_are_forgotten() -> None:
    table = Table()
    add(table, {"name": [f"name {i}" for i in range(100)]}, 100)
    before = table.nbytes
    table.keep(torch.arange(50, 60))
    assert table.columns["name"].words == [f"name {i}" for i in range(50, 60)]
    assert found({"name": "name 55"}, table) == [5]
    assert table.nbytes < before / 4


def test_files_are_checked() -> None:
    table = built()
    with pytest.raises(FormatError, match=r"column 'year' must be torch.int64 of shape \(9,\)"):
        Table.load(table.settings(), table.tensors(), 9)
