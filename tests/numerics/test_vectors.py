"""Codes of vectors: what is learned, by hand and by theory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from quantforge.errors import InputError
from quantforge.numerics import vectors
from quantforge.numerics.vectors import MAX_BITS, Mode, Moments, allocate, distortions, learn

DIM = 64


def moments_of(x: np.ndarray) -> Moments:
    pivot = x[:3].mean(0)
    c = x - pivot
    return Moments(len(x), pivot, c.sum(0), c.T @ c, float((np.square(c).sum(1) ** 2).sum()))


def skewed(n: int, seed: int = 0) -> np.ndarray:
    generator = np.random.RandomState(seed)
    mix = np.linalg.qr(np.random.RandomState(9).standard_normal((DIM, DIM)))[0]
    spread = np.arange(1, DIM + 1) ** -0.7
    return (generator.standard_normal((n, DIM)) * spread) @ mix + 0.3


def test_distortions_are_those_of_lloyd_max() -> None:
    np.testing.assert_allclose(distortions()[:5], [1, 0.3634, 0.1175, 0.03454, 0.0095], rtol=2e-3)


def test_allocation_is_the_best_of_all() -> None:
    variance, widths = np.array([8.0, 2.0, 0.3]), np.array([16, 16, 16])

    def cost(bits: np.ndarray) -> float:
        return float((variance**1.5 * distortions()[bits]).sum())

    grid = np.stack(np.meshgrid(*[np.arange(MAX_BITS + 1)] * 3), -1).reshape(-1, 3)
    for budget in (1, 3, 6, 11, 24):
        best = min(cost(bits) for bits in grid if bits.sum() <= budget)
        assert cost(allocate(variance, widths, 16 * budget)) == pytest.approx(best)


def test_allocation_never_exceeds_its_budget_with_a_narrow_last_segment() -> None:
    widths = np.array([16, 16, 8])
    for budget in range(0, 330, 8):
        bits = allocate(np.array([4.0, 3.9, 3.8]), widths, budget)
        assert (bits * widths).sum() <= budget
        assert (np.diff(bits) <= 0).all()


def test_moments_see_mean_and_covariance() -> None:
    x = skewed(4000)
    moments = moments_of(x)
    np.testing.assert_allclose(moments.mean, x.mean(0), atol=1e-12)
    sample = np.cov(x.T, bias=True)
    assert np.linalg.norm(moments.covariance - sample) < 0.03 * np.linalg.norm(sample)


def test_few_isotropic_vectors_look_isotropic() -> None:
    x = np.random.RandomState(1).standard_normal((100, DIM))
    values = np.linalg.eigvalsh(moments_of(x).covariance)
    assert values.max() < 1.5 * values.min()
    assert np.linalg.eigvalsh(np.cov(x.T)).max() > 5 * np.linalg.eigvalsh(np.cov(x.T)).min()


@pytest.mark.parametrize("mode", ["oblivious", "centred", "adapted"])
def test_forward_and_dual_are_inverse(mode: Mode) -> None:
    code = learn(mode, moments_of(skewed(500)), 2, 5)
    np.testing.assert_allclose(code.forward.T @ code.dual, np.eye(DIM), atol=1e-9)
    assert code.bits.sum() <= 2 * DIM


@pytest.mark.parametrize("mode", ["oblivious", "centred", "adapted"])
def test_scores_are_products_with_decoded_vectors(mode: Mode) -> None:
    x, query = skewed(300), skewed(7, 1)
    code = learn(mode, moments_of(x), 3, 5)
    encoded = vectors.encode(code, x)
    found = vectors.scores(code, encoded, query)
    exact = (x - code.mean) @ code.mean  # stored, so not taken from the codes
    decoded = vectors.decode(code, encoded) - code.mean
    expected = (query - code.mean) @ decoded.T + (query @ code.mean)[:, None] + exact
    np.testing.assert_allclose(found, expected, atol=1e-10)


def dominated(n: int, seed: int = 0) -> np.ndarray:
    """Vectors with one direction that has most of the variance of its segment."""
    x = np.random.RandomState(seed).standard_normal((n, DIM))
    x[:, 7] *= 10
    return x + 0.3


@pytest.mark.parametrize("data", [skewed, dominated])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["oblivious", "centred", "adapted"])
def test_errors_are_as_large_as_said_and_scores_unbiased(
    mode: Mode, bits: int, data: Callable[..., np.ndarray]
) -> None:
    x, query = data(3000), data(100, 1)
    if mode == "oblivious":  # along the vector itself there is no error: a mean would be coded well
        x, query = x - 0.3, query - 0.3
    code = learn(mode, moments_of(x), bits, 5)
    code = vectors.with_measured_errors(code, mode, 5, x[:2000] - code.mean)
    x = data(1000, 2) - (0.3 if mode == "oblivious" else 0)
    encoded = vectors.encode(code, x)
    error = vectors.standard_errors(code, mode, 5, encoded, query)
    wrong = vectors.scores(code, encoded, query) - query @ x.T
    assert 0.8 < np.sqrt(np.square(wrong).mean() / np.square(error).mean()) < 1.25
    assert abs(wrong.mean()) < 0.05 * wrong.std()


def test_a_centre_moves_what_is_coded() -> None:
    x = skewed(200)
    code = learn("adapted", moments_of(x), 2, 5)
    centre = x + 0.01 * skewed(200, 3)
    near = vectors.decode(code, vectors.encode(code, x, centre), centre)
    far = vectors.decode(code, vectors.encode(code, x))
    assert np.square(near - x).sum() < 0.01 * np.square(far - x).sum()


def test_learning_needs_vectors() -> None:
    with pytest.raises(InputError, match="at least 2 vectors; got 1"):
        learn("adapted", moments_of(np.ones((1, DIM))), 2, 0)
    code = learn("adapted", moments_of(np.ones((5, DIM))), 2, 0)
    encoded = vectors.encode(code, np.ones((5, DIM)))
    np.testing.assert_allclose(vectors.decode(code, encoded), 1.0)
