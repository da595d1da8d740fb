"""Hadamard matrices of order 2^k * {1, 12, 20, 28}.

The odd part is Paley's construction (R. E. A. C. Paley, "On orthogonal matrices", 1933); powers
of two are Sylvester's. `H = H_{2^k} (x) H_m`, so a transform is one dense stage of m additions
and k butterfly stages.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def _jacobsthal(prime: int) -> NDArray[np.int8]:
    """Return the matrix of Legendre symbols chi(i - j), shape (prime, prime)."""
    chi = np.full(prime, -1, np.int8)
    chi[np.arange(1, prime) ** 2 % prime] = 1
    chi[0] = 0
    index = np.arange(prime)
    return chi[(index[:, None] - index) % prime]


@lru_cache(maxsize=8)
def base_matrix(order: int) -> NDArray[np.int8]:
    """Return the (order, order) matrix of +-1 for the odd part: order 1, 12, 20 or 28."""
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order in (12, 20):  # type I: order - 1 is a prime = 3 mod 4
        prime = order - 1
        skew = np.zeros((order, order), np.int8)
        skew[0, 1:] = 1
        skew[1:, 0] = -1
        skew[1:, 1:] = _jacobsthal(prime)
        return skew + np.eye(order, dtype=np.int8)
    if order == 28:  # type II: order / 2 - 1 is a prime = 1 mod 4
        prime = order // 2 - 1
        symmetric = np.zeros((prime + 1, prime + 1), np.int8)
        symmetric[0, 1:] = symmetric[1:, 0] = 1
        symmetric[1:, 1:] = _jacobsthal(prime)
        off_diagonal = np.array([[1, 1], [1, -1]], np.int8)
        diagonal = np.array([[1, -1], [-1, -1]], np.int8)
        eye = np.eye(prime + 1, dtype=np.int8)
        return np.kron(symmetric, off_diagonal) + np.kron(eye, diagonal)
    raise AssertionError(f"no base matrix of order {order}")


def hadamard_matrix(power: int, base: int) -> NDArray[np.int8]:
    """Return `H_{2^power} (x) H_base` as a dense matrix of +-1."""
    matrix = np.ones((1, 1), np.int8)
    for _ in range(power):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(matrix, base_matrix(base))
