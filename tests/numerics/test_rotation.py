"""Rotations: orthogonal, reproducible for ever, and equal to their fast transforms."""

from __future__ import annotations

import numpy as np
import pytest

from quantforge.numerics.hadamard import hadamard_matrix
from quantforge.numerics.rotation import (
    butterfly,
    haar_matrix,
    qjl_seed,
    rotation_matrix,
    rotation_signs,
)
from quantforge.spec import QuantSpec, hadamard_base

HADAMARD_DIMS = (1, 2, 12, 20, 28, 64, 80, 96, 112, 128, 192, 384, 640, 768, 896, 1536)
QR_DIMS = (1, 3, 63, 100, 127)
FLOAT64_EPS = np.finfo(np.float64).eps


def _spec(dim: int, kind: str, seed: int = 0) -> QuantSpec:
    return QuantSpec(dim, rotation=kind, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dim", "kind"),
    [(d, "hadamard") for d in HADAMARD_DIMS] + [(d, "qr") for d in (*QR_DIMS, 64, 384)],
)
def test_orthogonal_without_padding(dim: int, kind: str) -> None:
    matrix = rotation_matrix(_spec(dim, kind))
    assert matrix.shape == (dim, dim)
    assert matrix.dtype == np.float64
    error = np.abs(matrix @ matrix.T - np.eye(dim)).max()
    assert error <= 16 * FLOAT64_EPS * max(dim, 4) ** 0.5


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
def test_a_seed_means_one_rotation(kind: str) -> None:
    rotation_signs.cache_clear()
    haar_matrix.cache_clear()
    first = rotation_matrix(_spec(64, kind, 5)).copy()
    rotation_signs.cache_clear()
    haar_matrix.cache_clear()
    np.testing.assert_array_equal(first, rotation_matrix(_spec(64, kind, 5)))
    assert np.abs(first - rotation_matrix(_spec(64, kind, 6))).max() > 0.1
    assert np.abs(first - rotation_matrix(_spec(64, kind), seed=qjl_seed(5))).max() > 0.1


def test_the_stream_is_frozen() -> None:
    """Changing these numbers changes every code ever written: it is a format change."""
    signs = rotation_signs(16, 0)
    assert signs.astype(int).tolist() == [1, -1, -1, 1] + [-1] * 7 + [1, 1, -1, 1, 1]
    # numpy promises RandomState(0).standard_normal() == 1.764052345967664; (1, 1) keeps its sign
    assert haar_matrix(1, 0).item() == 1.0
    gaussian = np.array([[1.764052345967664, 0.4001572083672233]])
    gaussian = np.append(gaussian, [[0.9787379841057392, 2.240893199201458]], axis=0)
    first = gaussian[:, 0] / np.linalg.norm(gaussian[:, 0])  # Gram-Schmidt keeps its direction
    np.testing.assert_allclose(haar_matrix(2, 0)[:, 0], first, rtol=1e-14)


def test_qjl_seed_wraps_and_differs() -> None:
    assert qjl_seed(0) != 0
    assert 0 <= qjl_seed(2**32 - 1) < 2**32
    QuantSpec(64, seed=qjl_seed(2**32 - 1))  # is itself a valid seed


@pytest.mark.parametrize("dim", HADAMARD_DIMS)
def test_butterfly_is_the_dense_matrix(dim: int) -> None:
    base = hadamard_base(dim)
    assert base is not None
    x = np.random.RandomState(dim).randint(-999, 1000, (3, 2, dim))  # sums are exact integers
    dense = hadamard_matrix((dim // base).bit_length() - 1, base).astype(np.int64)
    got = butterfly(x.astype(np.float32), base)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, x @ dense.T)


def test_haar_is_uniform() -> None:
    """Entries have mean 0 and mean square 1/d; without the fix of signs the mean is not 0."""
    dim, count = 4, 4000
    stack = np.stack([haar_matrix.__wrapped__(dim, seed) for seed in range(count)])
    mean_error = stack.std(0) / count**0.5
    assert (np.abs(stack.mean(0)) <= 5 * mean_error).all()
    square_error = np.square(stack).std(0) / count**0.5
    assert (np.abs(np.square(stack).mean(0) - 1 / dim) <= 5 * square_error).all()
