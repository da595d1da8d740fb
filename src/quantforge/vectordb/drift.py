"""Whether the vectors that are added still come from where those came that an index learned from.

Vectors are seen along fixed random directions a_j, chosen before any data:

    y_j = <a_j, x - pivot>,   sums of y_j, y_j^2, y_j^3, y_j^4 of those learned and those added

    z(mean j)     = (m' - m) / sqrt(v / n + v' / n')            v variance of y_j
    z(spread j)   = (v' - v) / sqrt(w / n + w' / n')            w variance of (y_j - m)^2

Without drift each z is a standard normal number once there are many vectors, whatever their
distribution (and y_j, sums of many coordinates, are near to normal themselves). Directions that
follow the data would not do: principal directions fit the sample that they come from, and any other
sample seems to have drifted from it.

The z depend on each other, so their maximum is compared with Bonferroni's threshold, which holds
for any dependence: 2 tests a direction, and a share of the rate for each look. Looks are taken when
the number added has doubled since the last one; the j-th of them, j from 1, may be wrong at a rate
RATE / (j (j + 1)), so all together at RATE.

Source: Welch, Biometrika 34 (1947), for z; Bonferroni's inequality for the threshold.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from quantforge.errors import FormatError

logger = logging.getLogger(__name__)

DIRECTIONS = 64
FIRST_LOOK = 1000
"""Vectors added before there is a judgement, and learned from: means of fewer are not normal."""
MAX_LOOKS = 64
"""Looks that a file may speak of: each comes after twice as many vectors as the one before."""
RATE = 1e-3
"""Chance that an index whose data do not drift ever says so."""
POWERS = 4


@dataclass(frozen=True)
class Drift:
    """What is known of the data that were added; those of `merge` and `update` are not counted.

    Attributes:
        learned: vectors that the index learned from.
        added: vectors added since.
        mean_z: greatest |z| of a mean.
        spread_z: greatest |z| of a variance.
        threshold: what both stay below, without drift, at the rate that `drift` documents; inf
            before there are enough vectors.
        mean_shift: how far the mean has moved, in standard deviations of a vector: the root of
            |mean' - mean|^2 / E|x - mean|^2, less what chance explains.
        spread_ratio: variance, summed over directions, of what was added over that of what was
            learned.
    """

    learned: int
    added: int
    mean_z: float
    spread_z: float
    threshold: float
    mean_shift: float
    spread_ratio: float

    @property
    def found(self) -> bool:
        """Whether the data have drifted."""
        return max(self.mean_z, self.spread_z) > self.threshold

    def __str__(self) -> str:
        said = f"{self.added} vectors added to an index that learned from {self.learned}: "
        if self.threshold == float("inf"):
            return said + f"too few to tell (from {FIRST_LOOK} of each on)"
        return (
            f"{said}{'DRIFT' if self.found else 'no drift'}; mean moved by {self.mean_shift:.2f} "
            f"standard deviations (z {self.mean_z:.1f}), spread {self.spread_ratio:.2f} times "
            f"(z {self.spread_z:.1f}); threshold {self.threshold:.1f}"
        )


class Sums:
    """Count and sums of the first four powers of projections, (4, directions) float64."""

    def __init__(self, count: int, powers: torch.Tensor) -> None:
        self.count, self.powers = count, powers

    def add(self, y: torch.Tensor) -> None:
        """Take in projections (n, directions)."""
        self.count += len(y)
        self.powers += powers_of(y).cpu()

    def moments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return mean, variance, and variance of the squared distance from the mean."""
        m, second, third, fourth = self.powers / self.count
        v = (second - m * m).clamp_min(0)
        about = fourth - 4 * m * third + 6 * m**2 * second - 3 * m**4
        return m, v, (about - v * v).clamp_min(0)


def powers_of(y: torch.Tensor) -> torch.Tensor:
    """Return the sums over rows of the first four powers of y (n, m), (4, m)."""
    return torch.stack([y.pow(i).sum(0) for i in range(1, POWERS + 1)])


class Monitor:
    """Follows the data of one index.

    Args:
        dim: of the vectors.
        seed: of the directions.
        tensors: of a file; None to begin with.
    """

    def __init__(self, dim: int, seed: int, tensors: Mapping[str, torch.Tensor] | None = None):
        count = min(DIRECTIONS, dim)
        normal = np.random.RandomState(seed).standard_normal((dim, count))
        self._directions = torch.from_numpy(normal / np.linalg.norm(normal, axis=0))
        self._pivot: torch.Tensor | None = None
        self._learned, self._added = (
            Sums(0, torch.zeros(POWERS, count, dtype=torch.float64)) for _ in range(2)
        )
        self._looks, self._warned = 0, False
        if tensors is not None:
            self._load(tensors)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        sums = self._learned.powers.nbytes + self._added.powers.nbytes
        return self._directions.nbytes + sums

    def learn(self, x: torch.Tensor) -> None:
        """Take in vectors (n, dim) that the index learns from."""
        self._learned.add(self._project(x))

    def learning(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield batches (n, dim) that the index learns from, and take them in."""
        for batch in batches:
            self.learn(batch)
            yield batch

    def add(self, x: torch.Tensor) -> None:
        """Take in vectors (n, dim) that are added; warn once if they have drifted."""
        self.take(self.digest(x), len(x))

    def digest(self, x: torch.Tensor) -> torch.Tensor:
        """Return all that is wanted of vectors (n, dim), for `take`: their sums, or few as such."""
        y = self._project(x)
        return (y if len(x) <= POWERS else powers_of(y)).cpu()

    def take(self, digest: torch.Tensor, n: int) -> None:
        """Take in what `digest` returned of n vectors that are added."""
        self._added.count += n
        self._added.powers += powers_of(digest) if n <= POWERS else digest
        if self._added.count >= FIRST_LOOK << self._looks:
            self._looks = (self._added.count // FIRST_LOOK).bit_length()
            report = self.report()
            if report.found and not self._warned:
                self._warned = True
                logger.warning("%s; train a new index on a sample of all vectors", report)

    def report(self) -> Drift:
        """Return what is known."""
        ours, theirs = self._learned, self._added
        if min(ours.count, theirs.count) < FIRST_LOOK or not self._looks:
            return Drift(ours.count, theirs.count, 0.0, 0.0, float("inf"), 0.0, 1.0)
        (m, v, w), (m2, v2, w2) = ours.moments(), theirs.moments()
        noise = v / ours.count + v2 / theirs.count
        mean_z = _greatest(m2 - m, noise)
        spread_z = _greatest(v2 - v, w / ours.count + w2 / theirs.count)
        shift = float(((m2 - m).square() - noise).sum() / v.sum().clamp_min(1e-300))
        ratio = float(v2.sum() / v.sum()) if float(v.sum()) > 0 else 1.0
        threshold = threshold_of(2 * len(m), self._looks)
        return Drift(
            ours.count, theirs.count, mean_z, spread_z, threshold, max(shift, 0.0) ** 0.5, ratio
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that is remembered, for a file."""
        if self._pivot is None:
            return {}
        counts = [self._learned.count, self._added.count, self._looks, int(self._warned)]
        return {
            "drift_pivot": self._pivot,
            "drift_counts": torch.tensor(counts),
            "drift_learned": self._learned.powers,
            "drift_added": self._added.powers,
        }

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if "drift_pivot" not in tensors:
            return
        shape, pivot = self._learned.powers.shape, tensors["drift_pivot"]
        learned, added = tensors["drift_learned"], tensors["drift_added"]
        if not (learned.shape == added.shape == shape and len(pivot) == len(self._directions)):
            raise FormatError(
                f"moments of drift must have shape {tuple(shape)}; got {tuple(learned.shape)} and "
                f"{tuple(added.shape)}"
            )
        counts = tensors["drift_counts"]
        whole = counts.dtype == torch.int64 and counts.shape == (4,) and int(counts.min()) >= 0
        if not whole or counts[2] > MAX_LOOKS:
            raise FormatError(
                f"drift_counts must be two counts, at most {MAX_LOOKS} looks, and whether it was "
                f"warned; got {counts.tolist()}"
            )
        count, count2, self._looks, warned = counts.tolist()
        self._pivot, self._warned = pivot.clone(), bool(warned)
        self._learned, self._added = Sums(count, learned.clone()), Sums(count2, added.clone())

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.float64)
        directions = self._directions.to(x.device)
        if self._pivot is None and len(x):
            self._pivot = x.mean(0).cpu()
        return (
            x @ directions if self._pivot is None else (x - self._pivot.to(x.device)) @ directions
        )


def threshold_of(tests: int, look: int) -> float:
    """Return what the greatest |z| of some tests stays below at a look, from 1 on."""
    rate = RATE / (look * (look + 1)) / tests
    return float(-torch.special.ndtri(torch.tensor(rate / 2, dtype=torch.float64)))


def _greatest(difference: torch.Tensor, variance: torch.Tensor) -> float:
    moved = difference.abs() > 1e-12
    z = difference.abs() / variance.sqrt()
    return float(torch.where(moved, z, 0.0).nan_to_num(0.0, float("inf")).max())
