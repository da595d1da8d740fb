"""Shift and equalizer."""

from __future__ import annotations

import numpy as np

from quantforge.numerics.encode import decode, encode
from quantforge.numerics.statistics import (
    MIN_EQUALIZER,
    equalizer_from_rms,
    key_equalizer,
    measure,
)
from quantforge.spec import QuantSpec


def test_equalizer_by_hand() -> None:
    rms = np.array([[4.0, 1.0, 0.25, 16.0], [1.0, 1.0, 1.0, 1.0]])
    expected = [[0.5, 0.25, 0.125, 1.0], [1.0, 1.0, 1.0, 1.0]]
    np.testing.assert_allclose(equalizer_from_rms(rms), expected, rtol=1e-15)


def test_equalizer_is_positive() -> None:
    got = equalizer_from_rms(np.array([0.0, 1e-30, 1.0]))
    np.testing.assert_array_equal(got, [MIN_EQUALIZER, MIN_EQUALIZER, 1.0])
    np.testing.assert_array_equal(equalizer_from_rms(np.zeros((2, 3))), np.ones((2, 3)))


def test_equalizer_ignores_a_common_factor() -> None:
    rms = np.random.RandomState(0).uniform(0.1, 10, 64)
    np.testing.assert_allclose(equalizer_from_rms(rms), equalizer_from_rms(1e6 * rms), rtol=1e-13)


def test_key_equalizer_by_hand() -> None:
    keys, queries = np.array([4.0, 1.0, 1.0]), np.array([1.0, 1.0, 16.0])
    np.testing.assert_allclose(key_equalizer(keys, queries), [1.0, 0.5, 0.125], rtol=1e-15)
    np.testing.assert_array_equal(key_equalizer(keys, np.zeros(3)), equalizer_from_rms(keys))
    unread = key_equalizer(np.ones(2), np.array([1.0, 0.0]))
    np.testing.assert_allclose(unread, [np.sqrt(MIN_EQUALIZER), 1.0], rtol=1e-15)


def test_key_equalizer_makes_the_error_of_logits_least() -> None:
    generator = np.random.RandomState(3)
    keys, queries = generator.uniform(0.1, 10, (2, 64))

    def error(e: np.ndarray) -> float:
        return float(np.square(keys / e).sum() * np.square(queries * e).sum())

    best = key_equalizer(keys, queries)
    np.testing.assert_allclose(error(best), np.square((keys * queries).sum()), rtol=1e-12)
    for other in (np.ones(64), equalizer_from_rms(keys), best * generator.uniform(0.8, 1.2, 64)):
        assert error(other) > error(best)


def test_measure_by_hand() -> None:
    x = np.array([[[1.0, 10.0], [3.0, 10.0], [5.0, 40.0], [7.0, 20.0]]])
    shift, equalizer = measure(x)
    np.testing.assert_array_equal(shift, [[[4.0, 20.0]]])
    rms = np.sqrt([5.0, 150.0])
    np.testing.assert_allclose(equalizer[0, 0], np.sqrt(rms / rms[1]), rtol=1e-14)


def test_measure_has_one_statistic_per_set() -> None:
    x = np.random.RandomState(1).standard_normal((2, 3, 50, 8))
    shift, equalizer = measure(x)
    assert shift.shape == equalizer.shape == (2, 3, 1, 8)
    alone = measure(x[1, 2])
    np.testing.assert_allclose(shift[1, 2], alone[0], rtol=1e-13)
    np.testing.assert_allclose(equalizer[1, 2], alone[1], rtol=1e-13)


def test_they_reduce_the_error_of_biased_loud_channels() -> None:
    """The reason they exist: a key bias and two loud channels must not eat all bits."""
    generator = np.random.RandomState(2)
    x = generator.standard_normal((500, 64))
    x[:, :2] *= 50
    x += 20 * generator.standard_normal(64)
    spec = QuantSpec(64, 4, scale_rule="mse")
    shift, equalizer = (s[0].astype(np.float32) for s in measure(x))

    def quiet_error(**statistics: np.ndarray) -> float:
        decoded = decode(encode(x, spec, **statistics), spec, **statistics)
        return float(np.square(decoded - x)[:, 2:].mean())

    plain, shifted = quiet_error(), quiet_error(shift=shift)
    both = quiet_error(shift=shift, equalizer=equalizer)
    assert shifted < 0.7 * plain
    assert both < 0.2 * shifted


def test_no_statistics_is_zero_and_one() -> None:
    x = np.random.RandomState(3).standard_normal((20, 64)).astype(np.float32)
    spec = QuantSpec(64, 3)
    plain = encode(x, spec)
    neutral = encode(x, spec, np.zeros(64, np.float32), np.ones(64, np.float32))
    np.testing.assert_array_equal(plain.packed, neutral.packed)
    np.testing.assert_array_equal(plain.scales, neutral.scales)
