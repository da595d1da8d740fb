"""What was measured on vectors: the points that no other beats, and which of them to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from os import PathLike
from typing import Any, Literal

from quantforge.optimizer.advice import Chosen, Recommendation, call, draw
from quantforge.optimizer.compare import Gain, standard_error
from quantforge.optimizer.measure import Accuracy, Point
from quantforge.optimizer.policies import Policy
from quantforge.optimizer.reward import Weights, pareto, saved
from quantforge.optimizer.sample import Sample
from quantforge.optimizer.space import Config, name
from quantforge.text import table
from quantforge.vectordb.config import IndexConfig

Kind = Literal["vectors", "index"]


@dataclass(frozen=True)
class Scorer:
    """The reward of a point.

    Attributes:
        measure: of accuracy.
        weights: of accuracy, memory, latency.
        dense_bytes: of a vector in float32.
        dense_ms: time of the same search with float32; None where latency does not count.
    """

    measure: Accuracy
    weights: Weights
    dense_bytes: float
    dense_ms: float | None

    def accuracy(self, point: Point) -> float:
        """Return the accuracy by the half of the samples that chooses."""
        return float(point.accuracy(self.measure, "choice").mean())

    def costs(self, point: Point) -> tuple[float, ...]:
        """Return what is saved of the bytes and, where latency counts, of the time."""
        memory = saved(point.bytes_per_vector, self.dense_bytes)
        if point.latency is None or self.dense_ms is None:
            return (memory,)
        return memory, saved(point.latency.median_ms, self.dense_ms)

    def reward(self, point: Point) -> float:
        """Return the reward, by the half of the samples that chooses."""
        return self.weights.reward(self.accuracy(point), *self.costs(point))


@dataclass(frozen=True)
class Choice:
    """The point of a kind with the best reward, and the defaults at its bits.

    Attributes:
        best: of the points within the limits.
        plain: the defaults at the same bits.
        gain: in accuracy, of `best` over `plain`, on samples that did not choose; None where
            they are the same.
        plain_allowed: whether the defaults are within the limits.
    """

    best: Point
    plain: Point
    gain: Gain | None
    plain_allowed: bool = True

    @property
    def recommended(self) -> Point:
        """`best` if its gain exceeds the standard error or `plain` is not allowed, else `plain`."""
        stands = self.gain is None or self.gain.holds or not self.plain_allowed
        return self.best if stands else self.plain


@dataclass(frozen=True, eq=False)
class VectorOptimization:
    """All that was measured on vectors; `print` it for the table.

    Attributes:
        sample: vectors and queries it was measured on.
        stored: vectors that share what an index learns of them.
        scorer: what counts, and how much.
        policy: that chose the points.
        points_of_space: from which it chose.
        seed: of sample, rotations and policy.
        points: measured, in the order of measuring.
        no_latency: why latency does not count although it has a weight, or None.
        choices: by kind.
    """

    sample: Sample
    stored: int
    scorer: Scorer
    policy: Policy
    points_of_space: int
    seed: int
    points: tuple[Point, ...]
    no_latency: str | None
    choices: Mapping[Kind, Choice]

    def reward(self, point: Point) -> float:
        """Return the reward, by the half of the samples that chooses."""
        return self.scorer.reward(point)

    @property
    def accuracy(self) -> Accuracy:
        """The measure of accuracy."""
        return self.scorer.measure

    @cached_property
    def front(self) -> tuple[Point, ...]:
        """Points that no other beats in accuracy, bytes and, where it counts, latency, by bytes."""
        values = [
            (float(p.samples[self.accuracy].mean()), *self.scorer.costs(p)) for p in self.points
        ]
        front = [self.points[i] for i in pareto(values)]
        return tuple(sorted(front, key=lambda point: point.bytes_per_vector))

    @property
    def best(self) -> Choice:
        """The choice whose recommended point has the greater reward."""
        return max(self.choices.values(), key=lambda choice: self.reward(choice.recommended))

    @property
    def config(self) -> Chosen:
        """The recommended settings of each kind, to save."""
        kinds = self.choices.items()
        return Chosen({kind: c.recommended.config.to_dict() for kind, c in kinds})

    def table(self) -> str:
        """Return the points that no other beats, the recommended ones marked."""
        marked = {choice.recommended.config for choice in self.choices.values()}
        shown = {point.config: point for point in self.front}
        shown |= {c.recommended.config: c.recommended for c in self.choices.values()}
        head = ["", "settings", f"recall@{self.sample.k}", "cosine", "rel. MSE", "bytes/vector",
                "ratio", "ms", "reward"]  # fmt: skip
        rows = [
            [
                "*" if point.config in marked else "", name(point.config), f"{point.recall:.4f}",
                f"{point.cosine:.4f}", f"{point.mse:.5f}", f"{point.bytes_per_vector:.1f}",
                f"{4 * self.sample.dim / point.bytes_per_vector:.1f}",
                "-" if point.latency is None else f"{point.latency.median_ms:.2f}",
                f"{self.reward(point):.4f}",
            ]
            for point in sorted(shown.values(), key=lambda point: point.bytes_per_vector)
        ]  # fmt: skip
        return table(head, rows)

    def __str__(self) -> str:
        where = (
            f"{len(self.sample.base)} vectors of {self.sample.dim} numbers, "
            f"{len(self.sample.queries)} queries, metric {self.sample.metric}; {len(self.points)} "
            f"of {self.points_of_space} settings measured ({self.policy})"
        )
        notes = [] if self.no_latency is None else [self.no_latency]
        return "\n".join([where, *notes, self.table(), "", str(self.recommendation)])

    @property
    def recommendation(self) -> Recommendation:
        """What to use, why, and what it gives up."""
        return _advice(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        front = {point.config for point in self.front}
        return {
            "stored": self.stored,
            "sample": len(self.sample.base),
            "queries": len(self.sample.queries),
            "dim": self.sample.dim,
            "metric": self.sample.metric,
            "accuracy": self.accuracy,
            "weights": asdict(self.scorer.weights),
            "policy": self.policy,
            "points_of_space": self.points_of_space,
            "seed": self.seed,
            "dense_ms": self.scorer.dense_ms,
            "no_latency": self.no_latency,
            "points": [
                p.to_dict() | {"reward": self.reward(p), "front": p.config in front}
                for p in self.points
            ],
            "choices": {kind: _choice_dict(choice) for kind, choice in self.choices.items()},
            "config": {kind: dict(values) for kind, values in self.config.sections.items()},
            "recommendation": asdict(self.recommendation),
        }

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw accuracy over bytes into a file (needs the extra `plot`)."""
        series: dict[str, tuple[list[float], list[float]]] = {}
        for kind in self.choices:
            found = [p for p in self.points if kind_of(p.config) == kind]
            series[kind] = self._xy(found)
        label = f"recall@{self.sample.k}" if self.accuracy == "recall" else self.accuracy
        title = f"{len(self.sample.base)} vectors of {self.sample.dim}, {self.sample.metric}"
        labels = ("bytes per vector", label if label != "mse" else "1 - relative MSE")
        draw(path, series, self._xy(self.front), labels, title, log=False)

    def _xy(self, points: Sequence[Point]) -> tuple[list[float], list[float]]:
        return (
            [p.bytes_per_vector for p in points],
            [float(p.samples[self.accuracy].mean()) for p in points],
        )


def kind_of(config: Config) -> Kind:
    """Return the section of a settings file that a config belongs to."""
    return "index" if isinstance(config, IndexConfig) else "vectors"


def _choice_dict(choice: Choice) -> dict[str, Any]:
    return {
        "best": name(choice.best.config),
        "plain": name(choice.plain.config),
        "gain": None if choice.gain is None else asdict(choice.gain),
        "recommended": name(choice.recommended.config),
    }


def _advice(result: VectorOptimization) -> Recommendation:
    """Say what the best choice is."""
    choice, objective, sample = result.best, result.accuracy, result.sample
    point, gain = choice.recommended, choice.gain
    if gain is None:
        against = "these are the defaults at their bits"
    else:
        found = "beats" if gain.holds else "does not beat"
        against = (
            f"{name(choice.best.config)} {found} {name(choice.plain.config)} by more than one "
            f"standard error: {gain.mean:+.4f} +- {gain.standard_error:.4f} in {objective} on the "
            "half of the samples that did not choose"
        )
        if not choice.plain_allowed:
            against += ", but these are beyond a limit"
    weights = ", ".join(f"{key} {value:g}" for key, value in asdict(result.scorer.weights).items())
    checked = point.accuracy(objective, "check")
    top = max(result.points, key=lambda p: p.samples[objective].mean())
    dense = 4 * sample.dim
    most = (
        "no other measured is more accurate"
        if top is point
        else f"{name(top.config)} would give up {1 - top.recall:.2%} and {top.mse:.2%} for "
        f"{top.bytes_per_vector:.1f} bytes"
    )
    return Recommendation(
        what=call(point.config),
        why=f"the greatest reward ({weights}) of {len(result.points)} measured; {against}",
        expected=f"{objective if objective != 'mse' else '1 - relative MSE'} "
        f"{checked.mean():.4f} +- {standard_error(checked):.4f} with {len(sample.base)} vectors; "
        "more vectors lie closer, so recall falls with their number",
        nbytes=f"{point.bytes_per_vector:.1f} per vector instead of {dense} in float32, "
        f"{dense / point.bytes_per_vector:.1f} times fewer",
        gives_up=f"{1 - point.recall:.2%} of the {sample.k} nearest and {point.mse:.2%} of the "
        f"squared length; {most}",
    )
