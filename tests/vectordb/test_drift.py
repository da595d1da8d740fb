"""Drift is found where there is some, and not where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch

from quantforge.errors import FormatError
from quantforge.vectordb.drift import DIRECTIONS, FIRST_LOOK, RATE, Monitor, threshold_of
from tests.vectordb.data import skewed

DIM = 96
Draw = Callable[[np.random.RandomState, int], np.ndarray]


def heavy(random: np.random.RandomState, n: int) -> np.ndarray:
    """Vectors of very unequal length."""
    return random.standard_t(5, (n, DIM)) * np.exp(0.4 * random.standard_normal((n, 1)))


def skewed_to_one_side(random: np.random.RandomState, n: int) -> np.ndarray:
    return np.exp(random.standard_normal((n, DIM)))


def monitor(x: torch.Tensor) -> Monitor:
    found = Monitor(DIM, 0)
    for batch in x.split(700):
        found.learn(batch)
    return found


@pytest.mark.parametrize("draw", [heavy, skewed_to_one_side])
def test_data_that_do_not_drift_are_not_said_to(draw: Draw) -> None:
    greatest = []
    for seed in range(25):
        random = np.random.RandomState(seed)
        found = monitor(torch.from_numpy(draw(random, 1500)))
        found.add(torch.from_numpy(draw(random, 1500)))
        report = found.report()
        assert not report.found
        greatest += [report.mean_z, report.spread_z]
    # the greatest of 64 normal numbers is 2.6 on average, with a deviation of .4
    assert 2.2 < np.mean(greatest) < 2.9


@pytest.mark.parametrize(
    ("change", "which"),
    [
        (lambda x: x + 0.15 * x.std(), "mean_z"),
        (lambda x: x * 1.15, "spread_z"),
        (lambda x: x.roll(1, 1), "mean_z"),
    ],
)
def test_drift_is_found_and_measured(
    change: Callable[[torch.Tensor], torch.Tensor], which: str
) -> None:
    x, y = skewed(4000, DIM), change(skewed(4000, DIM, 1))
    y += torch.linspace(0, 0.1, DIM) if which == "mean_z" else 0
    found = monitor(x)
    found.add(y)
    report = found.report()
    assert report.found
    assert getattr(report, which) > report.threshold
    total = x.var(0).sum()
    shift = float((y.mean(0) - x.mean(0)).square().sum() / total) ** 0.5
    assert report.mean_shift == pytest.approx(shift, rel=0.35, abs=0.05)
    assert report.spread_ratio == pytest.approx(float(y.var(0).sum() / total), rel=0.2)
    assert "DRIFT; mean moved by" in str(report)


def test_all_looks_together_keep_the_rate() -> None:
    rates = []
    for look in range(1, 200):
        z = torch.tensor(threshold_of(2 * DIRECTIONS, look), dtype=torch.float64)
        rates.append(float(2 * torch.special.ndtr(-z)) * 2 * DIRECTIONS)
    assert 0.98 * RATE < sum(rates) <= RATE
    assert rates == sorted(rates, reverse=True)


def test_the_warning_comes_once(caplog: pytest.LogCaptureFixture) -> None:
    found = monitor(skewed(2000, DIM))
    with caplog.at_level(logging.WARNING, logger="quantforge.vectordb.drift"):
        for seed in range(8):
            found.add(skewed(FIRST_LOOK // 2, DIM, seed) + 0.2)
    assert len(caplog.records) == 1
    assert "train a new index" in caplog.text


def test_few_vectors_are_not_judged() -> None:
    found = monitor(skewed(2000, DIM))
    found.add(skewed(FIRST_LOOK - 1, DIM) + 1)
    report = found.report()
    assert not report.found
    assert "too few to tell" in str(report)
    nothing = Monitor(DIM, 0)
    nothing.add(skewed(3000, DIM))
    assert not nothing.report().found


def test_batches_and_files_change_nothing() -> None:
    x, y = skewed(3000, DIM), skewed(3000, DIM, 1) + 0.05
    whole, parts = monitor(x), monitor(x)
    whole.add(y)
    for batch in y.split(500):
        parts.add(batch)
        parts = Monitor(DIM, 0, parts.tensors())
    ours, theirs = whole.report(), parts.report()
    assert ours.mean_z == pytest.approx(theirs.mean_z, rel=1e-6)
    assert ours.spread_z == pytest.approx(theirs.spread_z, rel=1e-6)
    assert (ours.added, ours.threshold) == (theirs.added, theirs.threshold)
    assert Monitor(DIM, 0, Monitor(DIM, 0).tensors()).report() == Monitor(DIM, 0).report()
    with pytest.raises(FormatError, match=r"must have shape \(4, 64\); got \(4, 63\)"):
        Monitor(DIM, 0, parts.tensors() | {"drift_learned": torch.zeros(4, 63)})


def test_constant_data_are_no_drift() -> None:
    found = monitor(torch.ones(2000, DIM))
    found.add(torch.ones(2000, DIM))
    assert not found.report().found
    found.add(torch.zeros(2000, DIM))
    assert found.report().found
