"""One number for accuracy, memory and latency, and the points that no other beats in all of them.

    r = (w_a * accuracy + w_m * memory + w_l * latency) / (w_a + w_m + w_l)

    accuracy   in [0, 1]; of vectors recall@10, mean cosine, or 1 - relative squared error; of a
               cache `accuracy_of_kl`, so that a fourth of the KL is worth 0.15
    memory     1 - bytes / bytes uncompressed (float32 vectors; the model's own cache)
    latency    1 - time / time uncompressed, at least -1

The scales are fixed, so a reward does not depend on what else was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from quantforge.errors import ConfigError
from quantforge.spec import check_choice

BEST_KL = 1e-4
"""KL, nats, below which a cache counts as exact."""


@dataclass(frozen=True)
class Weights:
    """What counts, and how much.

    Args:
        accuracy: weight from 0.
        memory: likewise.
        latency: likewise; 0: it is not measured.

    Raises:
        ConfigError: for a negative weight, or none above 0.
    """

    accuracy: float = 1.0
    memory: float = 1.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.accuracy, self.memory, self.latency)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ConfigError(f"weights must be finite and from 0, one of them above; got {self}")

    @staticmethod
    def of(objective: str | Weights) -> Weights:
        """Return weights, or those that a name of OBJECTIVES stands for.

        Raises:
            ConfigError: for a name that does not exist.
        """
        if isinstance(objective, Weights):
            return objective
        check_choice("objective", objective, tuple(OBJECTIVES))
        return OBJECTIVES[objective]

    def reward(self, accuracy: float, memory: float, latency: float | None = None) -> float:
        """Return r; where latency is None it has no weight."""
        parts = [(self.accuracy, accuracy), (self.memory, memory)]
        parts += [] if latency is None else [(self.latency, latency)]
        total = sum(weight for weight, _ in parts)
        return sum(weight * part for weight, part in parts) / total if total else 0.0


OBJECTIVES: Mapping[str, Weights] = MappingProxyType(
    {
        "balanced": Weights(1, 1, 0),
        "accuracy": Weights(4, 1, 0),
        "bytes": Weights(1, 4, 0),
        "latency": Weights(1, 1, 2),
    }
)


def accuracy_of_kl(kl: float) -> float:
    """Return 1 for a KL of up to 1e-4 nats, 0 from 1 nat, even steps per factor between."""
    return min(1.0, max(0.0, math.log(max(kl, BEST_KL)) / math.log(BEST_KL)))


def saved(amount: float, uncompressed: float) -> float:
    """Return the share of an amount that is saved, at least -1."""
    return max(-1.0, 1.0 - amount / uncompressed)


def pareto(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points that no other beats, in order; greater is better.

    A point is beaten by one that is at least as good in everything and better in something; of
    equal points the first stays.

    Cost: O(points^2 * objectives).
    """
    values = np.asarray(points, np.float64)
    front = []
    for i, point in enumerate(values):
        as_good, better = (values >= point).all(1), (values > point).any(1)
        twin = bool((values[:i] == point).all(1).any())
        if not twin and not bool((as_good & better).any()):
            front.append(i)
    return front
