"""Rewards and the points that no other beats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantforge.errors import ConfigError
from quantforge.optimizer.compare import Gain, standard_error
from quantforge.optimizer.reward import Weights, accuracy_of_kl, pareto, saved
from quantforge.optimizer.timing import Latency, latency, why_no_latency

VALUES = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=20)


def test_reward_is_the_weighted_mean() -> None:
    assert Weights().reward(0.9, 0.5) == pytest.approx(0.7)
    assert Weights(1, 2, 1).reward(1.0, 0.5, 0.0) == pytest.approx(0.5)
    assert Weights(1, 1, 7).reward(0.9, 0.5) == pytest.approx(0.7)  # latency left out
    assert Weights(0, 0, 1).reward(0.9, 0.5) == 0.0


@pytest.mark.parametrize("weights", [(-1, 1, 1), (0, 0, 0), (float("nan"), 1, 1)])
def test_weights_that_say_nothing(weights: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="weights must be finite"):
        Weights(*weights)


def test_scales() -> None:
    assert accuracy_of_kl(1.0) == accuracy_of_kl(50.0) == 0.0
    assert accuracy_of_kl(1e-2) == pytest.approx(0.5)
    assert accuracy_of_kl(1e-4) == accuracy_of_kl(0.0) == 1.0
    assert saved(1, 4) == 0.75
    assert saved(100, 4) == -1


@given(VALUES)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int, int]]) -> None:
    def beats(a: tuple, b: tuple) -> bool:
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    front = pareto(points)
    assert [points[i] for i in front] == [
        p for i, p in enumerate(points)
        if not any(beats(q, p) for q in points) and p not in points[:i]
    ]  # fmt: skip


def test_gain_is_paired() -> None:
    plain = np.random.RandomState(0).standard_normal(50)
    better = plain + 0.1 + 0.01 * np.random.RandomState(1).standard_normal(50)
    gain = Gain.of(better, plain)
    assert gain.holds  # far within the spread of either
    assert gain.mean == pytest.approx(0.1, abs=0.01)
    assert gain.standard_error == standard_error(better - plain) < 0.01
    assert not Gain.of(plain, plain).holds
    assert not Gain(0.1, 0.1).holds


def test_latency_counts_only_beyond_its_noise() -> None:
    clear = [Latency(1.0, 0.1), Latency(2.0, 0.2)]
    assert why_no_latency(clear) is None
    noisy = [Latency(1.0, 3.0), Latency(2.0, 2.5)]
    assert "differ by 2.75 ms, settings by 1 ms" in str(why_no_latency(noisy))
    assert why_no_latency([Latency(1.0, 0.1)] * 2) is not None


def test_latency_calls_and_warms_up() -> None:
    import torch

    calls = []
    found = latency(lambda: calls.append(1), torch.device("cpu"), runs=3)
    assert len(calls) == 4
    assert 0 <= found.median_ms < 1000
