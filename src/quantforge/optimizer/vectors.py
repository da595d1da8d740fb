"""Settings of codes and indexes for vectors: measured, weighed, checked against the defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

from quantforge.errors import ConfigError
from quantforge.optimizer import policies
from quantforge.optimizer.compare import Gain
from quantforge.optimizer.measure import Accuracy, Point, measure, uncompressed_latency
from quantforge.optimizer.policies import Policy
from quantforge.optimizer.reward import Weights
from quantforge.optimizer.sample import Sample
from quantforge.optimizer.space import Config, Space, baseline, name
from quantforge.optimizer.timing import why_no_latency
from quantforge.optimizer.vector_result import (
    Choice,
    Kind,
    Scorer,
    VectorOptimization,
    kind_of,
)
from quantforge.spec import check_choice, check_int
from quantforge.vectordb.config import Metric


def optimize_vectors(
    data: Any,
    *,
    objective: str | Weights = "balanced",
    accuracy: Accuracy = "recall",
    max_bytes: float | None = None,
    min_accuracy: float | None = None,
    queries: Any = None,
    metric: Metric = "ip",
    space: Space | None = None,
    policy: Policy = "auto",
    trials: int = 100,
    sample: int = 10_000,
    stored: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> VectorOptimization:
    """Find settings for vectors (n, dim) by measuring them on a sample.

    Args:
        data: numpy (a memory map too) or torch; codes are measured on `sample` of its rows.
        objective: weights of accuracy, memory and latency, or a name of OBJECTIVES: "balanced",
            "accuracy", "bytes" or "latency". Latency is measured if it has a weight.
        accuracy: "recall" (@10), "cosine" or "mse".
        max_bytes: bytes per vector that a choice may have.
        min_accuracy: accuracy that a choice must have.
        queries: (m, dim); None: 400 rows of the data, a fifth at most, which are not stored then.
        metric: "ip", "cosine" or "l2". For cosine vectors are scaled to length 1 before they are
            coded: an index does so by itself, for codes it is up to you.
        space: settings to choose from; `Space()` if None.
        policy: "auto" measures all of fewer than 200 points, else asks Optuna's TPE (random
            points where it is not installed); or "exhaustive", "random", "tpe", "nsga2".
        trials: points that a policy other than exhaustive measures.
        sample: vectors that are coded and searched.
        stored: vectors that there will be, which share what an index learns; None: those of data.
        device: where codes are measured; an index is measured on the CPU.
        seed: of everything drawn.
        progress: told what is being measured.

    Raises:
        InputError: for data that do not fit.
        ConfigError: for a setting that does not exist, or if no point is within the limits.
        UnsupportedError: if the policy needs Optuna and it is not installed.
    """
    check_choice("accuracy", accuracy, get_args(Accuracy))
    check_int("sample", sample, 10, 1 << 31)
    check_choice("metric", metric, get_args(Metric))
    weights, space = Weights.of(objective), space or Space()
    drawn = Sample.of(data, queries, metric, sample, seed, device)
    points = space.points(drawn.dim, metric, seed)
    stored = len(data) if stored is None else stored
    check_int("stored", stored, 1, 1 << 62)
    check_int("trials", trials, 1, 1 << 31)
    policy = policies.resolve(policy, len(points))
    timed = weights.latency > 0
    dense_ms = uncompressed_latency(drawn).median_ms if timed else None
    scorer = Scorer(accuracy, weights, 4 * drawn.dim, dense_ms)
    measured: dict[Config, Point] = {}

    def measured_point(config: Config) -> Point:
        if config not in measured:
            progress(name(config))
            measured[config] = measure(config, drawn, stored, timed=timed)
        return measured[config]

    def evaluate(config: Config) -> tuple[float, ...]:
        point = measured_point(config)
        return scorer.reward(point), scorer.accuracy(point), *scorer.costs(point)

    policies.run(policy, space, points, evaluate, trials, seed, 3 if timed else 2)
    for config in [baseline(config, drawn.dim) for config in list(measured)]:
        measured_point(config)
    times = [p.latency for p in measured.values() if p.latency is not None]
    if (no_latency := why_no_latency(times) if times else None) is not None:
        scorer = replace(scorer, dense_ms=None)
    allowed = [p for p in measured.values() if _within(p, scorer, max_bytes, min_accuracy)]
    if not allowed:
        raise ConfigError(_nothing_within(measured, scorer, max_bytes, min_accuracy))
    return VectorOptimization(
        sample=drawn,
        stored=stored,
        scorer=scorer,
        policy=policy,
        points_of_space=len(points),
        seed=seed,
        points=tuple(measured.values()),
        no_latency=no_latency,
        choices=_choices(allowed, measured, scorer, drawn.dim),
    )


def _choices(
    allowed: list[Point], measured: Mapping[Config, Point], scorer: Scorer, dim: int
) -> dict[Kind, Choice]:
    """Return the best of each kind that has points within the limits."""
    choices: dict[Kind, Choice] = {}
    for kind in get_args(Kind):
        of_kind = [point for point in allowed if kind_of(point.config) == kind]
        if of_kind:
            best = max(of_kind, key=scorer.reward)
            plain = measured[baseline(best.config, dim)]
            gain = _gain(best, plain, scorer.measure)
            choices[kind] = Choice(best, plain, gain, plain in allowed)
    return choices


def _gain(best: Point, plain: Point, measure: Accuracy) -> Gain | None:
    if best is plain:
        return None
    return Gain.of(best.accuracy(measure, "check"), plain.accuracy(measure, "check"))


def _within(
    point: Point, scorer: Scorer, max_bytes: float | None, min_accuracy: float | None
) -> bool:
    few = max_bytes is None or point.bytes_per_vector <= max_bytes
    return few and (min_accuracy is None or scorer.accuracy(point) >= min_accuracy)


def _nothing_within(
    measured: Mapping[Config, Point], scorer: Scorer, max_bytes: float | None,
    min_accuracy: float | None,
) -> str:  # fmt: skip
    limits = [] if max_bytes is None else [f"at most {max_bytes:g} bytes per vector"]
    limits += [] if min_accuracy is None else [f"{scorer.measure} of at least {min_accuracy:g}"]
    least = min(point.bytes_per_vector for point in measured.values())
    most = max(scorer.accuracy(point) for point in measured.values())
    return (
        f"no measured setting has {' and '.join(limits)}; the fewest bytes are {least:.1f}, the "
        f"best accuracy is {most:.4f}: relax a limit"
    )
