"""Whether a difference is more than its noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Gain:
    """By how much something is better, on samples that had no say in its choice.

    Attributes:
        mean: of the paired differences.
        standard_error: of that mean.
    """

    mean: float
    standard_error: float

    @staticmethod
    def of(better: F64, plain: F64) -> Gain:
        """Return the gain of paired samples, where greater is better."""
        difference = better - plain
        return Gain(float(difference.mean()), standard_error(difference))

    @property
    def holds(self) -> bool:
        """Whether it exceeds its standard error."""
        return self.mean > self.standard_error


def standard_error(x: F64) -> float:
    """Return the standard error of the mean of at least two numbers."""
    return float(np.std(x, ddof=1) / len(x) ** 0.5)
