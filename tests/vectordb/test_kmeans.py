"""Centroids of lists against the float64 oracle, and how well they divide data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.numerics import kmeans as oracle
from quantforge.vectordb.kmeans import LONGEST, imbalance, learn_centroids, nearest, step
from tests.vectordb.data import clustered, skewed


@pytest.mark.parametrize("dim", [3, 40])
def test_a_step_is_the_oracles(dim: int) -> None:
    x, centroids = skewed(500, dim), skewed(20, dim, 1)
    centroids[3] += 100  # has no vectors and stays
    moved, counts = step(x, centroids, torch.zeros(20))
    expected, expected_counts = oracle.lloyd_step(x.double().numpy(), centroids.double().numpy())
    np.testing.assert_array_equal(counts.numpy(), expected_counts)
    np.testing.assert_allclose(moved.numpy(), expected, atol=1e-5)
    assert torch.equal(moved[3], centroids[3])


def test_batches_of_a_step_add_up() -> None:
    x, centroids = clustered(600, 8, 5), clustered(5, 8, 5, 1)
    labels = nearest(x, centroids)
    whole, counts = step(x, centroids, torch.zeros(5))
    moved, seen = centroids, torch.zeros(5)
    for batch in (x[:200], x[200:]):
        moved, seen = step(batch, moved, seen)
    assert seen.sum() == counts.sum() == 600
    if torch.equal(nearest(x[200:], moved), labels[200:]):
        np.testing.assert_allclose(moved.numpy(), whole.numpy(), atol=1e-5)


def test_clusters_are_found_and_the_seed_decides() -> None:
    x = clustered(4000, 16, 40)
    centroids = learn_centroids(x, 40, 0)
    assert torch.equal(centroids, learn_centroids(x, 40, 0))
    assert not torch.equal(centroids, learn_centroids(x, 40, 1))
    left = (x - centroids[nearest(x, centroids)]).square().sum()
    assert left < 1.4 * x.numel()  # 1 is what is around the true centres


def test_long_lists_are_split() -> None:
    x = torch.cat([0.01 * skewed(5000, 8), 5 + 3 * skewed(500, 8, 2)])
    sizes = torch.bincount(nearest(x, learn_centroids(x, 50, 0)), minlength=50)
    assert sizes.max() <= 1.5 * LONGEST * len(x) / 50
    assert imbalance(sizes) < 3


def test_vectors_that_are_all_equal_need_no_more_than_one_list() -> None:
    x = torch.ones(300, 4)
    centroids = learn_centroids(x, 8, 0)
    assert centroids.isfinite().all()
    assert (x - centroids[nearest(x, centroids)]).abs().max() < 1e-6
