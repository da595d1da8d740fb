"""String ids and metadata of an index: they stay with their vectors, whatever is done to these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.vectordb import IndexConfig, QuantizedIndex
from tests.vectordb.data import skewed

DIM, N = 32, 600
X, Q = (torch.nn.functional.normalize(skewed(n, DIM, n)).numpy() for n in (N, 20))
NAMES = [f"doc-{i}" for i in range(N)]
META = {
    "year": [2000 + i % 25 for i in range(N)],
    "lang": [("en", "de", None)[i % 3] for i in range(N)],
}


def built(**settings: Any) -> QuantizedIndex:
    index = QuantizedIndex(DIM, IndexConfig(metric="cosine", **settings))
    index.add(X, NAMES, META)
    return index


def consistent(index: QuantizedIndex) -> None:
    """Every vector has its own id and metadata, by what it decodes to."""
    names = index.ids.tolist()
    numbers = [int(name.removeprefix("doc-")) for name in names]
    wrong = np.square(index.reconstruct(names) - X[numbers]).sum(1)
    assert (wrong < 0.2 * np.square(X[numbers]).sum(1)).all()
    for number, row in zip(numbers, index.metadata(names), strict=True):
        expected = {"year": 2000 + number % 25, "lang": ("en", "de", None)[number % 3]}
        assert row == {name: value for name, value in expected.items() if value is not None}


@pytest.mark.parametrize("nlist", [0, 12])
def test_everything_takes_and_returns_strings(nlist: int, tmp_path: Path) -> None:
    index = built(nlist=nlist)
    consistent(index)
    found, _ = index.search(X[:5], 1)
    assert found[:, 0].tolist() == NAMES[:5]
    assert index.search(X[:1], 3, ids=["doc-7"])[0].tolist() == [["doc-7", None, None]]
    index.remove_ids(NAMES[10:200])
    consistent(index)
    index.add(X[10:20], NAMES[10:20], [{"year": 2000 + i % 25} for i in range(10, 20)])
    index.update(NAMES[10:20], X[10:20], {"lang": META["lang"][10:20]})
    consistent(index)
    limits, near, _ = index.range_search(X[:2], float(index.search(X[:2], 3)[1].min()))
    assert set(near) <= set(index.ids)
    assert limits[-1] == len(near)
    index.save(tmp_path / "index")
    consistent(QuantizedIndex.load(tmp_path / "index"))
    first, second = index.shard(2)
    consistent(first)
    first.merge(second)
    consistent(first)
    assert len(first) == len(index)
    asked: list[Any] = []

    def fetch(ids: np.ndarray) -> np.ndarray:
        asked.extend(ids)
        return X[[int(name.removeprefix("doc-")) for name in ids]]

    exact, _ = index.search(X[:5], 1, rerank=20, fetch=fetch)
    assert exact[:, 0].tolist() == NAMES[:5]
    assert isinstance(asked[0], str)
    index.rebuild(fetch)
    consistent(index)


@pytest.mark.parametrize("nlist", [0, 12])
def test_filters_over_metadata_are_those_by_ids(nlist: int) -> None:
    index = built(nlist=nlist)
    where = {"year": {"gte": 2010, "lt": 2020}, "or": [{"lang": "de"}, {"lang": None}]}
    wanted = [NAMES[i] for i in range(N) if 10 <= i % 25 < 20 and i % 3 > 0]
    for ours, theirs in zip(
        index.search(Q, 10, where=where), index.search(Q, 10, ids=wanted), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    some = index.range_search(Q, 0.0, where=where)
    np.testing.assert_array_equal(some[1], index.range_search(Q, 0.0, ids=wanted)[1])
    assert (index.search(Q, 5, where={"year": 1900})[0] == None).all()  # noqa: E711
    with pytest.raises(InputError, match="one of them"):
        index.search(Q, 5, where=where, ids=wanted)


def test_lists_that_are_made_later_move_ids_and_metadata_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = QuantizedIndex(DIM, IndexConfig(metric="cosine", nlist=8))
    index.train(X, expected=N)
    for start in range(0, N, 50):
        part = slice(start, start + 50)
        index.add(X[part], NAMES[part], {name: values[part] for name, values in META.items()})
        consistent(index)
    assert index.nlist == 8


BAD: dict[str, tuple[Any, str]] = {
    "column type": (lambda i: i.add(X[:1], ["n"], {"year": ["x"]}), "column 'year' holds int64"),
    "integers": (lambda i: i.add(X[:1], [5]), "the index has string ids; got integers"),
    "numbered": (lambda i: i.add(X[:1]), "give one for each vector"),
    "unknown": (lambda i: i.update(["n"], X[:1]), "id 'n' is not in the index"),
    "removed": (lambda i: i.remove_ids(["doc-1", "n"]), "id 'n' is not"),
    "update type": (lambda i: i.update(["doc-1"], X[:1], {"lang": [3]}), "column 'lang'"),
    "both": (lambda i: i.merge(i.copy()), "id 'doc-0' is in both"),
    "bad vectors": (lambda i: i.add(X[:2] * np.nan, ["n", "m"], {"new": [1, 2]}), "finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_changes_nothing(name: str) -> None:
    call, message = BAD[name]
    index = built()
    with pytest.raises(InputError, match=message):
        call(index)
    assert index.ids.tolist() == NAMES
    consistent(index)


def test_numbers_go_on_after_what_was_removed(tmp_path: Path) -> None:
    index = QuantizedIndex(DIM)
    index.add(X)
    index.remove_ids([N - 1])
    index.save(tmp_path / "index")
    for each in (index, QuantizedIndex.load(tmp_path / "index"), index.copy(), index.shard(1)[0]):
        assert each.add(X[:1]).tolist() == [N]
    index.remove_ids(index.ids)
    assert index.add(X[:1], ["text"]).tolist() == ["text"]  # an empty index takes either kind
