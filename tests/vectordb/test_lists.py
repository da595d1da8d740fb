"""An index with lists: what it finds where it looks, and how rows move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.vectordb import IndexConfig, QuantizedIndex, learning, scan
from quantforge.vectordb.lists import Lists
from tests.vectordb.data import clustered, recall

DIM, LISTS = 32, 24
X, Q = clustered(3000, DIM, 60), clustered(40, DIM, 60, 1)
METRICS = ("ip", "cosine", "l2")


def built(x: torch.Tensor = X, **settings: Any) -> QuantizedIndex:
    index = QuantizedIndex(DIM, IndexConfig(**{"nlist": LISTS, **settings}))
    index.add(x)
    return index


def exact(metric: str, x: torch.Tensor = X) -> torch.Tensor:
    if metric == "l2":
        return -(torch.cdist(Q.double(), x.double()) ** 2)
    if metric == "cosine":
        unit = torch.nn.functional.normalize
        return unit(Q).double() @ unit(x).double().T
    return Q.double() @ x.double().T


def grown(**settings: Any) -> QuantizedIndex:
    """Return an index whose lists came when it had grown: they only show the way."""
    index = QuantizedIndex(DIM, IndexConfig(**{"nlist": LISTS, **settings}))
    for batch in X.split(500):
        index.add(batch)
    return index


MAKERS = {"coded": built, "grown": grown}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mode", ["oblivious", "centred", "adapted"])
@pytest.mark.parametrize("maker", MAKERS)
def test_all_lists_find_the_nearest(maker: str, mode: str, metric: str) -> None:
    index = MAKERS[maker](mode=mode, metric=metric, bits=8)
    assert index.nlist == LISTS
    assert index._known.partition.coded == (maker == "coded" and mode != "oblivious")
    ids, scores = index.search(Q, 10, nprobe=LISTS)
    truth = exact(metric)
    assert recall(torch.from_numpy(ids), truth.topk(10).indices) > 0.95
    sign = -1 if metric == "l2" else 1
    expected = sign * truth.gather(1, torch.from_numpy(ids)).numpy()
    assert np.abs(scores - expected).max() < 0.02 * float(truth.abs().max())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("maker", MAKERS)
def test_some_lists_find_what_is_in_them(maker: str, metric: str) -> None:
    index = MAKERS[maker](metric=metric)
    core = index._known
    everything, _ = index.search(Q, 3000, nprobe=LISTS)
    ids, scores = index.search(Q, 10, nprobe=3)
    query = index._vectors(Q)
    centroids = core.partition.centroids
    routes = -torch.cdist(query, centroids)
    if metric != "l2":
        routes = query @ centroids.T + 0.3 * query.norm(dim=1)[:, None] * core.partition.spreads
    for i in range(12):
        near = set(routes[i].topk(3).indices.tolist())
        rows = index._rows_of(everything[i])
        inside = [label in near for label in core.lists.of_rows(rows).tolist()]
        np.testing.assert_array_equal(ids[i], everything[i][inside][:10])
    one_by_one = [index.search(Q[i : i + 1], 10, nprobe=3) for i in range(12)]
    np.testing.assert_array_equal(ids[:12], np.concatenate([found for found, _ in one_by_one]))
    np.testing.assert_allclose(scores[:12], np.concatenate([s for _, s in one_by_one]), rtol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("maker", MAKERS)
def test_both_ways_through_the_codes_lead_to_the_same_rows(
    maker: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not on the CPU is scanned tile by tile."""
    index = MAKERS[maker]()
    index.add(X[:600] + 0.1)
    core = index._known
    assert len(core.lists.tail) > 0
    monkeypatch.setattr(scan, "MIN_TILE_ROWS", 100)
    monkeypatch.setattr(scan, "TILE_SCORES", 400)
    query, some = index._vectors(Q[:count]), torch.arange(0, 3600, 3)
    queries = core.codec.queries(query)
    routes = learning.routes("ip", query, core.partition.centroids)
    near = scan.nearest_lists(routes, core.lists.sizes, 3, 500)
    assert (near < 0).any() or count < 40
    for probes in (None, near):
        for allowed in (None, some, some[:5]):
            arguments = (core.shelf, queries, 20, probes, allowed)
            found, expected = scan.best_by_tiles(*arguments), scan.best(*arguments)
            assert torch.equal(found[1], expected[1])
            assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_wide_lists_are_looked_into_before_their_centroids_would_say(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    width = torch.rand(60, generator=generator) + 0.2
    centres = 2 * torch.randn(60, DIM, generator=generator)
    which = torch.randint(60, (4040,), generator=generator)
    noise = torch.randn(4040, DIM, generator=generator)
    points = scale * torch.nn.functional.normalize(centres[which] + 5 * width[which, None] * noise)
    x, query = points[:4000], points[4000:]
    core = built(x)._known
    lists, partition = core.lists, core.partition
    labels = partition.nearest(x)
    mean_square = (x - partition.centroids[labels]).square().sum(-1)
    own = torch.stack([mean_square[labels == i].mean() for i in range(LISTS)]).sqrt()
    torch.testing.assert_close(partition.spreads, own, rtol=0.1, atol=0)  # a sample's
    truth = labels[(query @ x.T).topk(10).indices]

    def found(routes: torch.Tensor) -> tuple[float, float]:
        near = routes.topk(4).indices
        share = (truth[:, :, None] == near[:, None]).any(2).float().mean()
        return float(share), float(lists.sizes[near].sum(1).float().mean())

    share, rows = found(learning.list_routes("ip", query, partition))
    plain, plain_rows = found(learning.routes("ip", query, partition.centroids))
    assert share > plain + 0.02
    assert share / rows > 0.98 * plain / plain_rows


def test_residuals_to_centroids_are_coded_better() -> None:
    truth = exact("ip").topk(10).indices
    found = {
        name: recall(torch.from_numpy(maker(bits=2).search(Q, 10, nprobe=LISTS)[0]), truth)
        for name, maker in MAKERS.items()
    }
    assert found["coded"] > found["grown"] + 0.03


@pytest.mark.parametrize("maker", MAKERS)
def test_the_tail_is_found_like_any_row(maker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = MAKERS[maker]()
    index.add(X[:700] + 0.1)
    lists = index._known.lists
    assert len(lists.tail) >= 700
    before = [index.search(Q, 10, nprobe=n) for n in (2, LISTS)]
    monkeypatch.setattr("quantforge.vectordb.lists.MIN_TAIL", 100)
    index.add(X[:1] + 0.2)
    assert len(lists.tail) == 0
    index.remove_ids([3700])
    for (ids, scores), n in zip(before, (2, LISTS), strict=True):
        after_ids, after_scores = index.search(Q, 10, nprobe=n)
        np.testing.assert_array_equal(ids, after_ids)
        np.testing.assert_allclose(scores, after_scores, rtol=1e-5)
    labels = lists.of_rows(torch.arange(len(index)))
    assert (labels.diff() >= 0).all()


@pytest.mark.parametrize("maker", MAKERS)
def test_rows_are_themselves_wherever_they_go(maker: str) -> None:
    index = MAKERS[maker](bits=8)
    known = {int(i): x for i, x in enumerate(X)}
    for removed in ([5, 2999], range(100, 400)):
        index.remove_ids(removed)
        known = {i: x for i, x in known.items() if i not in set(removed)}
    for i, other in ((7, 1000), (8, 2000), (9, 2500)):
        known[i] = X[other] + 0.01
    index.update([7, 8, 9], torch.stack([known[i] for i in (7, 8, 9)]))
    new = index.add(X[:50] + 0.02)
    known |= {int(i): x + 0.02 for i, x in zip(new, X[:50], strict=True)}
    assert sorted(index.ids) == sorted(known)
    decoded = index.reconstruct(list(known))
    wanted = torch.stack(list(known.values())).numpy()
    assert np.square(decoded - wanted).sum(1).max() < 0.1
    core = index._known
    labels = core.lists.of_rows(core.catalog.ids.left)
    nearest = core.partition.nearest(torch.from_numpy(index.reconstruct(index.ids)))
    assert (labels == nearest).float().mean() > 0.99  # by what was coded, or by what codes say
    assert core.lists.sizes.sum() == len(core.rows)
    assert index.list_report()["rows"].sum() == len(core) == len(known)


@pytest.mark.parametrize("nprobe", [1, 4, LISTS])
def test_filters(nprobe: int) -> None:
    index = built()
    index.add(X[:300] + 0.1)
    allowed = index.ids % 3 == 0
    bitmap = np.packbits(allowed, bitorder="little")
    ids, _ = index.search(Q, 5, nprobe=nprobe, bitmap=bitmap)
    assert (ids % 3 == 0).all()
    assert (ids >= 0).all()
    few, _ = index.search(Q, 5, nprobe=nprobe, ids=[4, 8, 3100])
    assert (np.sort(few[:, :3]) == [4, 8, 3100]).all()
    assert (few[:, 3:] == -1).all()
    if nprobe == LISTS:
        plain, _ = index.search(Q, 3300, nprobe=nprobe)
        np.testing.assert_array_equal(ids, [row[row % 3 == 0][:5] for row in plain])


def test_more_lists_are_looked_into_when_these_hold_too_few() -> None:
    index = built()
    k = 500
    ids, scores = index.search(Q, k, nprobe=1)
    assert (ids >= 0).all()
    assert all(len(set(row)) == k for row in ids)
    assert (np.diff(scores, axis=1) <= 0).all()
    ids, _ = index.search(Q, 3000, nprobe=1)
    assert (np.sort(ids) == np.arange(3000)).all()


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_range_search_looks_into_all_lists(metric: str) -> None:
    index = built(metric=metric)
    ids, scores = index.search(Q, 3000, nprobe=LISTS)
    threshold = float(scores[:, 20].mean())
    limits, found, _ = index.range_search(Q, threshold)
    _, some, _ = index.range_search(Q, threshold, ids=np.arange(0, 3000, 2))
    assert sorted(some) == sorted(found[found % 2 == 0])
    for i in range(len(Q)):
        good = scores[i] <= threshold if metric == "l2" else scores[i] >= threshold
        assert sorted(found[limits[i] : limits[i + 1]]) == sorted(ids[i][good])


def test_nprobe_reaches_the_recall_it_is_chosen_for() -> None:
    index = built(metric="cosine")
    full, _ = index.search(Q, 10, nprobe=LISTS)
    found = index.calibrate(0.9, queries=Q)
    assert (found.nlist, found.queries, index.nprobe) == (LISTS, len(Q), found.nprobe)
    assert 1 <= found.nprobe < LISTS
    reached = recall(torch.from_numpy(index.search(Q, 10)[0]), torch.from_numpy(full))
    assert reached == pytest.approx(found.recall, abs=1e-6)
    assert reached >= 0.9
    fewer = index.search(Q, 10, nprobe=found.nprobe - 1)[0] if found.nprobe > 1 else full[:, :0]
    assert recall(torch.from_numpy(fewer), torch.from_numpy(full)) < 0.9 or found.nprobe == 1
    more = recall(torch.from_numpy(index.search(Q, 10, recall=0.98)[0]), torch.from_numpy(full))
    assert more >= 0.98
    own = index.calibrate(0.9)
    assert own.queries == 256
    reached = recall(torch.from_numpy(index.search(Q, 10)[0]), torch.from_numpy(full))
    assert reached > 0.8


def test_nprobe_for_exact_neighbours() -> None:
    index = built(bits=6, metric="l2")
    truth = exact("l2").topk(10).indices
    found = index.calibrate(0.9, queries=Q, truth=truth.numpy())
    assert recall(torch.from_numpy(index.search(Q, 10)[0]), truth) >= 0.9
    assert found.recall >= 0.9
    with pytest.raises(InputError, match="out of reach of codes alone"):
        built(bits=1).calibrate(0.99, queries=Q, truth=exact("ip").topk(10).indices.numpy())


def test_the_default_nprobe_comes_from_the_sample() -> None:
    index = built(metric="cosine", bits=8)
    full, _ = index.search(Q, 10, nprobe=LISTS)
    reached = recall(torch.from_numpy(index.search(Q, 10)[0]), torch.from_numpy(full))
    assert reached > 0.88
    assert index.nprobe < LISTS
    assert built(nprobe=3).nprobe == 3


@pytest.mark.parametrize("maker", MAKERS)
def test_files_keep_lists_and_what_was_measured(maker: str, tmp_path: Path) -> None:
    index = MAKERS[maker](mode="centred")
    index.add(X[:20] + 0.1)
    index.calibrate(0.8, queries=Q)
    index.save(tmp_path / "index")
    loaded = QuantizedIndex.load(tmp_path / "index")
    assert (loaded.nlist, loaded.nprobe) == (LISTS, index.nprobe)
    for ours, theirs in zip(index.search(Q, 7), loaded.search(Q, 7), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    errors = [i.standard_errors(Q, [1, 3019]) for i in (index, loaded)]
    np.testing.assert_array_equal(*errors)
    loaded.add(X[:10])
    index.add(X[:10])
    np.testing.assert_array_equal(index.search(Q, 7)[0], loaded.search(Q, 7)[0])


@pytest.mark.parametrize("maker", MAKERS)
def test_shards_are_parts_and_merge_to_the_whole(maker: str) -> None:
    index = MAKERS[maker]()
    index.add(X[:31] + 0.1)
    whole = index.search(Q, 10, nprobe=4)
    shards = index.shard(3)
    assert [len(shard) for shard in shards] == [1011, 1010, 1010]
    found = [shard.search(Q, 10, nprobe=4) for shard in shards]
    scores = np.concatenate([s for _, s in found], 1)
    np.testing.assert_allclose(-np.sort(-scores, 1)[:, :10], whole[1], rtol=1e-4)
    first = shards[0]
    for shard in shards[1:]:
        first.merge(shard)
    assert sorted(first.ids) == sorted(index.ids)
    np.testing.assert_array_equal(first.search(Q, 10, nprobe=4)[0], whole[0])
    with pytest.raises(InputError, match="is in both indexes"):
        first.merge(index)
    with pytest.raises(InputError, match="learned something else"):
        first.merge(built(X + 1.0))
    with pytest.raises(InputError, match="same kind"):
        first.merge(built(bits=2))
    assert len(first) == 3031
    empty = QuantizedIndex(DIM, index.config)
    empty.merge(first)
    first.remove_ids(first.ids)
    assert (len(first), len(empty)) == (0, 3031)


def test_standard_errors_are_those_of_the_scores() -> None:
    for metric in ("ip", "l2"):
        index = built(mode="adapted", bits=3, metric=metric)
        ids = np.arange(3000)
        found, scores = index.search(Q, 3000, nprobe=LISTS)
        truth = exact(metric).numpy() * (-1 if metric == "l2" else 1)
        wrong = scores - np.take_along_axis(truth, found, 1)
        error = index.standard_errors(Q, ids)
        assert 0.8 < np.sqrt(np.square(wrong).mean() / np.square(error).mean()) < 1.25


def test_lists_come_with_vectors_and_more_with_many_more() -> None:
    index = QuantizedIndex(8, IndexConfig(bits=2))
    x = clustered(10_500, 8, 50)
    for batch in x.split(3000):
        index.add(batch)
    assert (index.nlist, len(index)) == (256, 10_500)
    assert QuantizedIndex(8, IndexConfig(nlist=0)).config.lists_for(10**9) == 1
    counts = [IndexConfig().lists_for(n) for n in (9_999, 10_000, 66_000, 10**6, 10**8)]
    assert counts == [1, 256, 512, 2048, 16384]
    report = index.list_report()
    assert report["rows"].sum() == 10_500
    assert report["imbalance"] < 2
    held = index.memory_report()
    assert report["bytes"].sum() <= held["codes"] + held["scales"] + held["ids"]


def test_rebuild_makes_codes_of_a_grown_index_as_good_as_new() -> None:
    index = grown(bits=2)
    before = recall(torch.from_numpy(index.search(Q, 10, nprobe=LISTS)[0]), exact("ip").topk(10)[1])
    index.remove_ids([3])
    index.rebuild(lambda ids: X[ids])
    after = recall(torch.from_numpy(index.search(Q, 10, nprobe=LISTS)[0]), exact("ip").topk(10)[1])
    assert after > before + 0.03
    assert (len(index), 3 in index.ids) == (2999, False)
    with pytest.raises(InputError, match="rebuild needs vectors"):
        index.rebuild()
    kept = grown(originals="float16")
    kept.rebuild()
    assert kept._known.partition.coded


def test_lists_of_rows() -> None:
    lists = Lists.of(torch.tensor([1, 1, 3]), 5)
    lists.append(torch.tensor([4, 1]))
    assert lists.of_rows(torch.arange(5)).tolist() == [1, 1, 3, 4, 1]
    assert lists.sizes.tolist() == [0, 3, 0, 1, 1]
    lists.keep(torch.tensor([0, 2, 4]))
    assert lists.of_rows(torch.arange(3)).tolist() == [1, 3, 1]
    assert (lists.sorted_rows, lists.tail.tolist()) == (2, [1])
    starts, owner = scan.ranges(torch.tensor([3, 7, 9]), torch.tensor([5, 7, 10]))
    assert (starts.tolist(), owner.tolist()) == ([3, 4, 9], [0, 0, 2])


BAD = {
    "nprobe zero": (lambda i: i.search(Q, 5, nprobe=0), "nprobe must be a positive integer"),
    "nprobe float": (lambda i: i.search(Q, 5, nprobe=2.0), "nprobe must be a positive integer"),
    "both": (lambda i: i.search(Q, 5, nprobe=2, recall=0.9), "not both"),
    "recall": (lambda i: i.search(Q, 5, recall=1.5), "recall must be above 0"),
    "calibrate recall": (lambda i: i.calibrate(0.0), "recall must be above 0"),
    "calibrate k": (lambda i: i.calibrate(0.9, k=5000), "k must be an integer from 1 to 3000"),
    "truth alone": (lambda i: i.calibrate(0.9, truth=[[1]]), "one row for each query"),
    "truth unknown": (lambda i: i.calibrate(0.9, queries=Q[:1], truth=[[9999]]), "id 9999"),
    "merge": (lambda i: i.merge(QuantizedIndex(DIM)), "same kind"),
    "shards": (lambda i: i.shard(0), "count must be a positive integer"),
    "nan": (lambda i: i.add(torch.where(X > 1, torch.nan, X)), "NaN or infinity"),
    "too large": (lambda i: i.add(1e9 * X), "too large for the"),
    "removed": (lambda i: i.remove_ids([3, 5000]), "id 5000 is not"),
    "updated": (lambda i: i.update([5000], X[:1]), "id 5000 is not"),
    "stream": (lambda i: i.add_from([X[:5], X[:5, :3]]), r"\(\.\.\., 32\)"),
    "stream ids": (lambda i: i.add_from([X[:5]], [9000]), "one id for each of the 5"),
    "too many ids": (lambda i: i.add_from([X[:1]], [9000, 9001]), "one id for each of 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(name: str) -> None:
    call, message = BAD[name]
    index = built()
    before = (np.sort(index.ids), *index.search(Q, 5))
    with pytest.raises(InputError, match=message):
        call(index)
    for was, now in zip(before, (np.sort(index.ids), *index.search(Q, 5)), strict=True):
        np.testing.assert_array_equal(was, now)
    assert index.add(X[:1])[0] == 3000


def test_an_index_without_lists_says_so() -> None:
    index = QuantizedIndex(DIM)
    index.add(X)
    with pytest.raises(InputError, match="no lists to choose from: its 3000 vectors"):
        index.calibrate()
    np.testing.assert_array_equal(index.search(Q, 5, nprobe=3)[0], index.search(Q, 5)[0])
    untrained = QuantizedIndex(DIM, IndexConfig(nlist=64))
    with pytest.raises(InputError, match="64 lists are learned from as many vectors; got 50"):
        untrained.train(X[:50])
    assert not untrained.is_trained
    with pytest.raises(InputError, match="learned nothing yet"):
        untrained.list_report()
