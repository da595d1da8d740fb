"""Hadamard matrices of order 2^k * {1, 12, 20, 28}.

Order 12 is Williamson's construction (J. Williamson, "Hadamard's determinant theorem and the sum of
four squares", 1944), 20 and 28 are Paley's (R. E. A. C. Paley, "On orthogonal matrices", 1933),
powers of two Sylvester's. `H = H_m (x) H_{2^k}`: numbers that a dense stage mixes are dim / m
apart, and runs of 2^k are transformed by k butterfly stages.

A dense stage may be a product of sparse matrices, which say which sums are shared:

    12 = 4 x 3      y = (G (x) J + 2 S (x) I) x       G = I - S Hadamard, J all ones
                    sums s = (I (x) 1) x, then t = G s by two stages, and y_ki = 2 (S x)_ki + t_k

costs 52 additions instead of 132.
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


_SKEW = np.array([[0, 1, 1, 1], [-1, 0, -1, 1], [-1, 1, 0, -1], [-1, -1, 1, 0]], np.int8)
"""S of the order 12: a skew conference matrix."""


@lru_cache(maxsize=8)
def base_matrix(order: int) -> NDArray[np.int8]:
    """Return the (order, order) matrix of +-1 for the odd part: order 1, 12, 20 or 28."""
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order == 12:
        ones, eye = np.ones((3, 3), np.int8), np.eye(3, dtype=np.int8)
        mixing = np.eye(4, dtype=np.int8) - _SKEW
        return np.kron(mixing, ones) + 2 * np.kron(_SKEW, eye)
    if order == 20:  # type I: order - 1 is a prime = 3 mod 4
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


Terms = tuple[tuple[int, int], ...]


def dense_factors(order: int, *, transpose: bool = False) -> tuple[NDArray[np.int8], ...]:
    """Return matrices whose product, the last one first, is the base matrix (or its transpose).

    They are applied one after the other, each row a sum of its nonzero terms from left to right.
    Entries are 0, +-1 and 2, so no product is rounded. None for order 1.
    """
    if order == 1:
        return ()
    if order != 12:
        return (base_matrix(order).T if transpose else base_matrix(order),)
    eye, spread = np.eye(12, dtype=np.int8), np.kron(np.eye(4, dtype=np.int8), [[1, 1, 1]])
    pairs = np.array([[1, -1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, -1]], np.int8)
    skew = _SKEW
    if transpose:
        pairs, skew = pairs.T, skew.T
    return (
        np.concatenate([spread, eye]),
        _both(pairs, np.kron(skew, np.eye(3, dtype=np.int8))),
        _both(pairs, eye),  # pairs @ pairs == I - S
        np.concatenate([spread.T, 2 * eye], axis=1),
    )


def _both(upper: NDArray[np.int8], lower: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return the block diagonal matrix of two."""
    right = np.zeros((len(upper), lower.shape[1]), np.int8)
    left = np.zeros((len(lower), upper.shape[1]), np.int8)
    return np.block([[upper, right], [left, lower]])


@lru_cache(maxsize=8)
def dense_program(order: int, *, transpose: bool = False) -> tuple[tuple[Terms, ...], ...]:
    """Return, for each factor and each of its rows, the terms (column, coefficient)."""
    return tuple(
        tuple(tuple((int(j), int(row[j])) for j in np.flatnonzero(row)) for row in factor)
        for factor in dense_factors(order, transpose=transpose)
    )


def hadamard_matrix(power: int, base: int) -> NDArray[np.int8]:
    """Return `H_base (x) H_{2^power}` as a dense matrix of +-1."""
    matrix = np.ones((1, 1), np.int8)
    for _ in range(power):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(base_matrix(base), matrix)
