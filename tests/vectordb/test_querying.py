"""Searches that choose how much to read: candidates by errors, two stages; and drift."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantforge.errors import FormatError, InputError
from quantforge.ops.mixed_search.native import PreparedSearch
from quantforge.vectordb import IndexConfig, QuantizedIndex
from quantforge.vectordb.querying import plan_of
from tests.vectordb.data import recall, skewed

DIM, K = 64, 10
X, Q = skewed(3000, DIM), skewed(80, DIM, 1)


def built(**settings: Any) -> QuantizedIndex:
    index = QuantizedIndex(DIM, IndexConfig(**{"bits": 2, "nlist": 0, **settings}))
    index.add(X)
    return index


def truth(metric: str) -> torch.Tensor:
    scores = -torch.cdist(Q, X) if metric == "l2" else Q @ X.T
    return scores.topk(K, dim=1).indices


@pytest.mark.parametrize(("originals", "metric"), [("float16", "ip"), ("int8", "l2")])
def test_candidates_are_as_many_as_the_recall_needs(originals: str, metric: str) -> None:
    index, exact = built(originals=originals, metric=metric), truth(metric)
    plain = recall(torch.from_numpy(index.search(Q, K)[0]), exact)
    found, scores = index.search(Q, K, rerank="auto")
    assert recall(torch.from_numpy(found), exact) > max(0.97, plain + 0.03)
    asked: list[int] = []

    def fetch(ids: np.ndarray) -> torch.Tensor:
        asked.append(len(ids))
        return X[ids]

    index.search(Q[:1], K, rerank="auto", recall=0.8, fetch=fetch)
    few = sum(asked)
    asked.clear()
    index.search(Q[:1], K, rerank="auto", recall=0.999, fetch=fetch)
    assert K <= few < sum(asked) < 200
    some, some_scores = index.search(Q, K, rerank="auto", ids=found[0])
    assert sorted(some[0]) == sorted(found[0])
    np.testing.assert_allclose(np.sort(some_scores[0]), np.sort(scores[0]), rtol=1e-3)


def test_rerank_is_checked() -> None:
    index = built()
    with pytest.raises(InputError, match="rerank needs vectors"):
        index.search(Q, K, rerank="auto")
    with pytest.raises(InputError, match="or \"auto\"; got 'many'"):
        index.search(Q, K, rerank="many", fetch=lambda ids: X[ids])  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_two_stages_find_what_a_scan_finds(metric: str) -> None:
    index = built(metric=metric, bits=3)
    whole, scores = index.search(Q, K)
    found, values = index.search(Q, K, two_stage=0.99)
    assert recall(torch.from_numpy(found), torch.from_numpy(whole)) > 0.98
    same = (found == whole).all(1)
    assert same.mean() > 0.8
    np.testing.assert_array_equal(values[same], scores[same])
    assert index._core is not None
    plan = plan_of(index._core, K, 0.99)
    assert plan.share < 0.9
    assert plan_of(index._core, K, 0.99) is plan
    with pytest.raises(InputError, match="without lists and a search without filter"):
        index.search(Q, K, two_stage=0.99, ids=[1, 2])


@pytest.mark.parametrize("settings", [{"bits": 3}, {"bits": 3, "mode": "centred"}], ids=str)
def test_two_stages_of_a_query_alone(settings: dict[str, Any]) -> None:
    """It is the native scan with a margin in place of bounds: scores are those of whole codes."""
    index = built(**settings)
    whole, scores = index.search(Q, K)
    alone = [index.search(q[None], K, two_stage=0.99) for q in Q]
    found, values = (np.concatenate(part) for part in zip(*alone, strict=True))
    assert recall(torch.from_numpy(found), torch.from_numpy(whole)) > 0.98
    same = (found == whole).all(1)
    np.testing.assert_array_equal(values[same], scores[same])


def test_two_stages_in_torch_find_what_native_ones_find(monkeypatch: pytest.MonkeyPatch) -> None:
    index = built(bits=3)
    native, _ = index.search(Q, K, two_stage=0.99)
    monkeypatch.setattr(PreparedSearch, "cannot", lambda specs, device: "not here")
    found, _ = index.copy().search(Q, K, two_stage=0.99)
    assert recall(torch.from_numpy(found), torch.from_numpy(native)) > 0.98


@pytest.mark.parametrize("originals", ["float16", "int8"])
def test_originals_follow_their_vectors(originals: str, tmp_path: Path) -> None:
    index = built(originals=originals, bits=1)
    index.remove_ids(np.arange(100))
    index.update([200], X[:1])
    index.save(tmp_path / "index")
    loaded = QuantizedIndex.load(tmp_path / "index")
    loaded.add(X[1:50], ids=np.arange(9001, 9050))
    for each, number, x in ((index, 200, X[0]), (loaded, 700, X[700]), (loaded, 9007, X[7])):
        ids, scores = each.search(x[None], 1, rerank=3000, ids=[number])
        assert ids[0, 0] == number
        assert scores[0, 0] == pytest.approx(float(x @ x), rel=0.01)
    per_vector = 2 * DIM if originals == "float16" else DIM + 4
    assert index.memory_report()["originals"] == pytest.approx(2900 * per_vector, rel=0.01)


@pytest.mark.parametrize("originals", ["float16", "int8"])
@pytest.mark.parametrize("nlist", [0, 10])
def test_originals_may_lie_in_a_file(originals: str, nlist: int, tmp_path: Path) -> None:
    ours, theirs = (built(originals=originals, nlist=nlist) for _ in range(2))
    ours.move_originals(tmp_path / "originals")
    for index in (ours, theirs):
        index.remove_ids(np.arange(100))
        index.update([200], X[:1])
        index.add(X[1:50], ids=np.arange(9001, 9050))
    ours.save(tmp_path / "index")
    (tmp_path / "moved").mkdir()
    for name in ("index", "originals"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    loaded = QuantizedIndex.load(tmp_path / "moved" / "index")
    loaded.add(X[50:60], ids=np.arange(8000, 8010))
    theirs.add(X[50:60], ids=np.arange(8000, 8010))
    joined, other = loaded.shard(2)
    joined.merge(other)
    held = theirs.memory_report()["originals"]
    for index in (loaded, loaded.copy(), joined):
        for a, b in zip(index.search(Q, K, rerank=50), theirs.search(Q, K, rerank=50), strict=True):
            np.testing.assert_array_equal(a, b)
        assert index.memory_report()["originals"] == 0 < held
    loaded.rebuild()
    theirs.rebuild()
    np.testing.assert_array_equal(
        loaded.search(Q, K, rerank=50)[1], theirs.search(Q, K, rerank=50)[1]
    )
    (tmp_path / "moved" / "originals").rename(tmp_path / "away")
    with pytest.raises(FormatError, match=r"originals is missing: .* put it there again"):
        QuantizedIndex.load(tmp_path / "moved" / "index")
    with pytest.raises(InputError, match="keeps no vectors"):
        built().move_originals(tmp_path / "more")
    with pytest.raises(InputError, match="away exists"):
        theirs.move_originals(tmp_path / "away")


def test_drift_is_reported_warned_of_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = built()
    report = index.drift()
    assert (report.learned, report.added, report.found) == (3000, 0, False)
    index.add(skewed(1500, DIM, 2))
    for start in range(3):
        index.add(skewed(3, DIM, 3 + start))
    report = index.drift()
    assert (report.added, report.found) == (1509, False)
    assert "no drift" in str(report)
    index.save(tmp_path / "index")
    loaded = QuantizedIndex.load(tmp_path / "index")
    assert loaded.drift() == report
    with caplog.at_level(logging.WARNING, logger="quantforge.vectordb.drift"):
        loaded.add(skewed(1500, DIM, 9) + 0.1)
        loaded.add(skewed(3000, DIM, 10) + 0.1)
    assert loaded.drift().found
    assert not index.drift().found
    assert len(caplog.records) == 1
    with pytest.raises(InputError):
        index.add(X * torch.nan)
    assert index.drift() == report
    assert not QuantizedIndex(DIM).drift().found


def families(n: int, seed: int) -> torch.Tensor:
    """Return unit vectors of 300 families, which are alike in quiet directions too."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(300, DIM, generator=torch.Generator().manual_seed(5))
    which = torch.randint(300, (n,), generator=generator)
    x = centres[which] + 0.7 * torch.randn(n, DIM, generator=generator)
    return torch.nn.functional.normalize(torch.arange(1, DIM + 1) ** -0.8 * x, dim=1)


def test_auto_reaches_its_recall_at_one_bit() -> None:
    """Near rows share what an adapted code leaves out: standard errors of any row are too small."""
    x, query = families(3000, 1), families(100, 2)
    index = QuantizedIndex(DIM, IndexConfig(bits=1, nlist=0))
    index.add(x)
    exact = (query @ x.T).topk(K, dim=1).indices
    asked: list[int] = []

    def fetch(ids: np.ndarray) -> torch.Tensor:
        asked.append(len(ids))
        return x[ids]

    found = [
        index.search(one[None], K, rerank="auto", recall=0.99, fetch=fetch)[0][0] for one in query
    ]
    assert recall(torch.from_numpy(np.array(found)), exact) >= 0.99
    assert sum(asked) < 0.04 * len(query) * len(x)
