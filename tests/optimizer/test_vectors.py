"""Settings for vectors: what is measured, what is chosen, and when the defaults stay."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantforge import QuantForgeConfig
from quantforge.errors import ConfigError, InputError, UnsupportedError
from quantforge.numerics.lloyd_max import distortion, solve
from quantforge.optimizer import Space, Weights, optimize, policies, recommend
from quantforge.optimizer.compare import Gain
from quantforge.optimizer.measure import measure
from quantforge.optimizer.policies import resolve, run
from quantforge.optimizer.sample import Sample
from quantforge.optimizer.space import baseline, name
from quantforge.optimizer.vector_result import Choice, VectorOptimization
from quantforge.vectordb import IndexConfig, QuantizedIndex

FEW = Space(bits=(2, 4), rotation=("hadamard",), codebook=("lloyd_max",))
CODES = replace(FEW, mode=())


def vectors(n: int = 600, dim: int = 64) -> np.ndarray:
    """Return vectors with loud and quiet directions, about a mean."""
    loud = np.geomspace(3, 0.1, dim)
    return (np.random.RandomState(0).standard_normal((n, dim)) * loud + 0.3).astype(np.float32)


@pytest.fixture(scope="module")
def found() -> VectorOptimization:
    return optimize(vectors(), space=FEW)


def test_every_point_of_a_small_space_is_measured(found: VectorOptimization) -> None:
    assert found.policy == "exhaustive"
    assert len(found.points) == found.points_of_space == 2 * 3 + 2 * 3
    assert (len(found.sample.base), len(found.sample.queries)) == (480, 120)
    by_name = {name(point.config): point for point in found.points}
    plain = by_name["codes, 2 bits, hadamard"]
    assert by_name["codes, 2 bits, hadamard, mse"].mse < plain.mse
    assert by_name["codes, 4 bits, hadamard"].recall > plain.recall
    assert by_name["index, 2 bits, adapted"].recall > by_name["index, 2 bits, oblivious"].recall


def test_measures_are_those_of_the_codes(found: VectorOptimization) -> None:
    """Again, from the vectors; isotropic ones lose what theory says."""
    base, queries = found.sample.base.numpy(), found.sample.queries.numpy()
    config = IndexConfig(bits=4, mode="centred")
    point = next(p for p in found.points if p.config == config)
    index = QuantizedIndex(64, config)
    ids = index.add(base)
    restored, best = index.reconstruct(ids), np.argsort(-(queries @ base.T), 1)[:, :10]
    hits, _ = index.search(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(best, hits, strict=True)])
    assert point.recall == pytest.approx(recall)
    assert point.mse == pytest.approx(((restored - base) ** 2).sum() / (base**2).sum(), rel=1e-4)

    sphere = np.random.RandomState(1).standard_normal((500, 128)).astype(np.float32)
    sample = Sample.of(sphere, None, "cosine", 400, 0, "cpu")
    point = measure(QuantForgeConfig(bits=3, scale_rule="mse"), sample, 500, timed=False)
    d = distortion(solve(3))
    assert point.mse == pytest.approx(d, rel=0.05)
    assert point.cosine == pytest.approx((1 - d) ** 0.5, rel=0.01)
    assert point.bytes_per_vector == 3 * 128 / 8 + 2
    assert point.latency is None


def test_what_is_learned_is_shared_by_what_will_be_stored() -> None:
    sample = Sample.of(vectors(), None, "ip", 500, 0, "cpu")
    config = QuantForgeConfig(shift=True, equalizer=True)
    few, many = (measure(config, sample, n, timed=False).bytes_per_vector for n in (64, 6400))
    assert few - many == pytest.approx(2 * 4 * 64 * (1 / 64 - 1 / 6400))
    assert many == pytest.approx(34 + 2 * 4 * 64 / 6400)
    kinds = [IndexConfig(mode=mode) for mode in ("oblivious", "adapted")]
    sizes = [[measure(c, sample, n, timed=False).bytes_per_vector for n in (500, 10**9)]
             for c in kinds]  # fmt: skip
    assert all(small > large > 34 for small, large in sizes)
    assert sizes[0][1] == pytest.approx(sizes[1][1], abs=4)


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
def test_nearly_exact_codes_find_nearly_all(metric: Any) -> None:
    x = vectors() * np.random.RandomState(2).uniform(0.2, 5, (600, 1)).astype(np.float32)
    space = replace(FEW, bits=(8,), scale_rule=("unbiased",))
    result = optimize(x, space=space, metric=metric)
    assert all(point.recall > 0.96 for point in result.points)
    base, queries = result.sample.base.double(), result.sample.queries.double()
    distance = torch.cdist(queries, base) if metric == "l2" else -(queries @ base.T)
    truth = distance.argsort(1)[:, :10].sort().values
    assert torch.equal(result.sample.nearest.sort().values, truth)
    if metric == "cosine":
        assert torch.allclose(base.norm(dim=1), torch.ones(len(base), dtype=torch.float64))


def test_an_index_is_measured_without_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come by themselves from 10,000 vectors on, and leave some results out."""
    monkeypatch.setattr("quantforge.vectordb.config.LISTS_FROM", 100)
    sample, config = Sample.of(vectors(), None, "ip", 500, 0, "cpu"), IndexConfig(bits=8)
    assert config.lists_for(len(sample.base)) > 1
    assert measure(config, sample, 500, timed=False).recall > 0.97


def test_queries_are_not_among_what_is_stored() -> None:
    x = vectors(300)
    sample = Sample.of(x, None, "ip", 200, 0, "cpu")
    assert (len(sample.base), len(sample.queries)) == (200, 60)
    rows = torch.cat([sample.base, sample.queries])
    assert len(torch.unique(rows, dim=0)) == 260
    own = Sample.of(torch.from_numpy(x), x[:7] + 1, "ip", 1000, 0, "cpu")
    assert (len(own.base), len(own.queries)) == (300, 7)


def point_like(found: VectorOptimization, recall: np.ndarray) -> Any:
    return replace(found.points[0], samples={"recall": recall})


def test_a_choice_must_beat_the_defaults_by_more_than_its_noise(found: VectorOptimization) -> None:
    random = np.random.RandomState(0)
    plain = random.uniform(0.5, 0.9, 60)
    for better, chosen in ((plain + 0.01, "best"), (plain + random.normal(0, 0.2, 60), "plain")):
        points = {"best": point_like(found, better), "plain": point_like(found, plain)}
        choice = Choice(points["best"], points["plain"], Gain.of(better, plain))
        assert choice.recommended is points[chosen]
        assert replace(choice, plain_allowed=False).recommended is points["best"]


def test_the_defaults_are_measured_and_stand_where_nothing_beats_them() -> None:
    """Scale rules differ in recall by less than noise: the default stays."""
    x = np.random.RandomState(0).standard_normal((500, 64)).astype(np.float32)
    space = replace(CODES, bits=(3,), scale_rule=("norm",), codebook=("gaussian",))
    result = optimize(x, space=space)
    assert [name(p.config) for p in result.points] == [
        "codes, 3 bits, hadamard, gaussian, norm", "codes, 3 bits, hadamard",
    ]  # fmt: skip
    choice = result.choices["vectors"]
    if choice.gain is not None:
        assert (choice.recommended is choice.best) == choice.gain.holds
    better = optimize(x, space=replace(space, scale_rule=("mse",)), accuracy="mse")
    assert better.best.gain is not None
    assert better.best.gain.holds
    assert better.best.recommended.config == QuantForgeConfig(
        bits=3, rotation="hadamard", codebook="gaussian", scale_rule="mse"
    )
    assert "beats codes, 3 bits, hadamard by more" in better.recommendation.why


def test_weights_and_limits_choose(found: VectorOptimization) -> None:
    def best(**changes: Any) -> Any:
        return optimize(vectors(), space=CODES, **changes).best.recommended.config

    assert best(objective="bytes").bits == 2
    assert best(objective="accuracy").bits == 4
    assert best(objective=Weights(1, 0), max_bytes=20).bits == 2
    assert best(objective=Weights(0, 1), min_accuracy=0.8).bits == 4
    with pytest.raises(ConfigError, match=r"at most 5 bytes per vector; the fewest bytes are 18"):
        best(max_bytes=5)


def test_output(found: VectorOptimization, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert "12 of 12 settings measured (exhaustive)" in str(found)
    assert sum(line.startswith("*") for line in found.table().splitlines()) == 2
    plain = json.loads(json.dumps(found.to_dict()))
    assert len(plain["points"]) == 12
    front = {p["name"] for p in plain["points"] if p["front"]}
    assert front == {name(point.config) for point in found.front}
    found.plot(tmp_path / "front.svg")
    assert (tmp_path / "front.svg").read_bytes().startswith(b"<?xml")
    found.config.save(tmp_path / "settings.json")
    config = QuantForgeConfig.from_file(tmp_path / "settings.json")
    assert config == found.choices["vectors"].recommended.config
    index = IndexConfig.from_file(tmp_path / "settings.json")
    assert index == found.choices["index"].recommended.config


def test_advice_is_readable() -> None:
    advice = recommend(vectors(), space=CODES, objective="bytes")
    text = str(advice)
    assert advice.what == "QuantForgeConfig(bits=2, rotation='hadamard')" or "bits=2" in advice.what
    for word in ("use ", "why ", "expect ", "recall", "18.0 per vector instead of 256", "gives up"):
        assert word in text


def test_latency_counts_only_where_it_tells_points_apart() -> None:
    result = optimize(vectors(), space=replace(CODES, bits=(4,)), objective="latency")
    assert all(point.latency is not None for point in result.points)
    assert (result.scorer.dense_ms is None) == (result.no_latency is not None)


def test_the_same_seed_gives_the_same_result(found: VectorOptimization) -> None:
    assert optimize(vectors(), space=FEW).to_dict() == found.to_dict()
    other = optimize(vectors(), space=FEW, seed=1)
    assert other.points[0].config.seed == 1
    assert not torch.equal(other.sample.base, found.sample.base)


# ---- spaces and policies -------------------------------------------------------------------


def test_space_holds_what_exists() -> None:
    points = Space().points(384, "ip", 0)
    assert len(points) == len(set(points)) == 8 * 2 * 3 * 3 - 3 * 2 * 3 + 8 * 3 < 200
    odd = Space().points(100, "ip", 0)
    assert all(p.rotation == "qr" for p in odd if isinstance(p, QuantForgeConfig))
    assert baseline(odd[0], 100) in odd
    with pytest.raises(ConfigError, match="exists for vectors of 100 numbers"):
        Space(rotation=("hadamard",), mode=()).points(100, "ip", 0)
    with pytest.raises(ConfigError, match="scale_rule must be one of"):
        Space(scale_rule=("best",)).points(64, "ip", 0)  # type: ignore[arg-type]


def test_policy_by_size(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve("auto", 199) == "exhaustive"
    assert resolve("random", 10) == "random"
    with pytest.raises(ConfigError, match="policy must be one of"):
        resolve("grid", 10)  # type: ignore[arg-type]
    monkeypatch.setattr(policies, "find_spec", lambda module: object())
    assert resolve("auto", 200) == "tpe"
    monkeypatch.setattr(policies, "find_spec", lambda module: None)
    with caplog.at_level(logging.WARNING, "quantforge.optimizer"):
        assert resolve("auto", 200) == "random"
    assert "searched at random" in caplog.text
    with pytest.raises(UnsupportedError, match=r'pip install "quantforge\[optimize\]"'):
        resolve("nsga2", 10)


@pytest.mark.parametrize("policy", ["random", "tpe", "nsga2"])
def test_policies_measure_distinct_points_and_find_good_ones(policy: Any) -> None:
    """On a made-up reward of many points, whose best is known."""
    if policy != "random":
        pytest.importorskip("optuna")
    space = Space(shift=(False, True), equalizer=(False, True))
    points = space.points(64, "ip", 0)
    asked: list[Any] = []

    def evaluate(config: Any) -> tuple[float, ...]:
        asked.append(config)
        good = 0.1 * (getattr(config, "scale_rule", "") == "mse") + 0.3 * isinstance(
            config, QuantForgeConfig
        )
        accuracy, memory = 1 - 2.0**-config.bits + good, 1 - config.bits / 8
        return (accuracy + memory, accuracy, memory)

    run(policy, space, points, evaluate, 40, 0, 2)
    assert len(asked) == len(set(asked)) == 40
    assert set(asked) <= set(points)
    first = asked.copy()
    asked.clear()
    run(policy, space, points, evaluate, 40, 0, 2)
    assert asked == first  # the seed decides
    rewards = sorted((evaluate(p)[0] for p in points), reverse=True)
    best = max(evaluate(p)[0] for p in first)
    assert best >= rewards[len(points) // 20]
    if policy == "tpe":
        assert best == rewards[0]


@pytest.mark.parametrize("policy", ["random", "tpe", "nsga2"])
def test_a_search_ends_when_there_is_nothing_new(policy: Any) -> None:
    if policy != "random":
        pytest.importorskip("optuna")
    asked: list[Any] = []
    points = CODES.points(64, "ip", 0)

    def evaluate(config: Any) -> tuple[float, ...]:
        asked.append(config)
        return 1.0, 0.5, 0.5

    run(policy, CODES, points, evaluate, 1000, 0, 2)
    assert set(asked) == set(points)
    assert len(asked) == len(points)


@pytest.mark.parametrize(
    ("data", "arguments", "error", "message"),
    [
        (vectors(20), {}, InputError, "at least 50 vectors; got"),
        (vectors()[0], {}, InputError, r"shape \(n, dim\)"),
        (vectors().astype(int), {}, InputError, "int64"),
        (np.full((60, 8), np.nan, np.float32), {}, InputError, "NaN or infinity"),
        (vectors(), {"tokens": torch.ones(4, 4)}, InputError, "tokens belong to a model"),
        (vectors(), {"queries": vectors()[:2]}, InputError, "at least 4 queries; got 2"),
        (vectors(), {"queries": vectors(dim=32)}, InputError, "64"),
        (vectors(), {"accuracy": "psnr"}, ConfigError, "accuracy must be one of"),
        (vectors(), {"metric": "dot"}, ConfigError, "metric must be one of"),
        (vectors(), {"policy": "grid"}, ConfigError, "policy must be one of"),
        (vectors(), {"trials": 0}, ConfigError, "trials must be an integer"),
        (vectors(), {"sample": 5}, ConfigError, "sample must be an integer"),
        (vectors(), {"stored": 0}, ConfigError, "stored must be an integer"),
        ("data.npy", {}, InputError, "optimize takes vectors .* got str"),
    ],
)
def test_refused(
    data: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        optimize(data, **arguments)


@pytest.mark.gpu
def test_codes_are_measured_on_the_device() -> None:
    on_cpu, on_gpu = (optimize(vectors(), space=CODES, device=d) for d in ("cpu", "cuda"))
    for a, b in zip(on_cpu.points, on_gpu.points, strict=True):
        assert a.config == b.config
        assert a.mse == pytest.approx(b.mse, rel=1e-4)
        assert a.recall == pytest.approx(b.recall, abs=0.01)
