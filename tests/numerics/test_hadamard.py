"""Hadamard matrices: entries, orthogonality, and which dims have one."""

from __future__ import annotations

import numpy as np
import pytest

from quantforge.numerics.hadamard import base_matrix, dense_program, hadamard_matrix
from quantforge.spec import hadamard_base


@pytest.mark.parametrize("order", [1, 12, 20, 28])
def test_base_matrices_are_hadamard(order: int) -> None:
    matrix = base_matrix(order).astype(np.int64)
    assert matrix.shape == (order, order)
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("order", "additions"), [(1, 0), (12, 52), (20, 380), (28, 756)])
def test_dense_programs_are_the_base_matrix(order: int, additions: int, transpose: bool) -> None:
    matrix, count = np.eye(order, dtype=np.int64), 0
    for factor in dense_program(order, transpose=transpose):
        rows = [sum(c * matrix[j] for j, c in terms) for terms in factor]
        assert {abs(c) for terms in factor for _, c in terms} <= {1, 2}
        count += sum(len(terms) - 1 for terms in factor)
        matrix = np.stack(rows)
    expected = base_matrix(order).astype(np.int64)
    np.testing.assert_array_equal(matrix, expected.T if transpose else expected)
    assert count == additions


def test_power_two_is_sylvester() -> None:
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    np.testing.assert_array_equal(hadamard_matrix(2, 1), expected)


@pytest.mark.parametrize("base", [1, 12, 20, 28])
@pytest.mark.parametrize("power", [0, 1, 3])
def test_kronecker_products_are_hadamard(power: int, base: int) -> None:
    matrix = hadamard_matrix(power, base).astype(np.int64)
    dim = base << power
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, dim * np.eye(dim, dtype=np.int64))


def test_dims_with_a_hadamard_rotation() -> None:
    usual = {1: 1, 2: 1, 12: 12, 20: 20, 24: 12, 28: 28, 64: 1, 80: 20, 96: 12, 112: 28, 128: 1}
    usual |= {192: 12, 256: 1, 320: 20, 384: 12, 448: 28, 640: 20, 768: 12, 896: 28, 1024: 1}
    usual |= {1280: 20, 1536: 12, 3072: 12, 3584: 28, 4096: 1, 5120: 20, 7168: 28}
    for dim, base in usual.items():
        assert hadamard_base(dim) == base, dim


@pytest.mark.parametrize("dim", [0, 3, 5, 7, 36, 44, 60, 63, 72, 100, 127, 144, 160 + 1, 300])
def test_dims_without_a_hadamard_rotation(dim: int) -> None:
    assert hadamard_base(dim) is None
