"""Lloyd-Max quantizers of a coordinate of a rotated unit vector, solved in float64.

A coordinate t of a uniformly distributed unit vector in R^d has the density
`(1 - t^2)^((d-3)/2)` up to a constant (arXiv 2504.19874, Lemma 1). Centroids are given for
`u = sqrt(d) t`, which tends to N(0, 1). Running this module writes `data/lloyd_max.npz`:

    python -m quantforge.numerics.lloyd_max
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantforge.spec import E4M3_MAX_BITS, MAX_BITS

Array = NDArray[np.float64]

DATA_FILE = Path(__file__).parent / "data" / "lloyd_max.npz"
GAUSSIAN = 0
"""Stands for the limit of infinite dimension in the table of dims."""
TABLE_DIMS = (
    *(4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128),
    *(160, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, GAUSSIAN),
)
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_TAIL = 14.0
"""The Gaussian mass beyond 14 standard deviations is below 1e-43."""


def _density(dim: int) -> tuple[Callable[[Array], Array], float]:
    """Return the (unnormalized) density of u and the end of its support."""
    if dim == GAUSSIAN:
        return lambda u: np.exp(-0.5 * u * u), _TAIL
    half = (dim - 3) / 2

    def beta(u: Array) -> Array:
        return np.exp(half * np.log1p(-np.minimum(u * u / dim, 1 - 1e-300)))

    return beta, min(math.sqrt(dim), _TAIL)


def _integrate(f: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Return the integral of f over each interval [low_i, high_i] by Gauss-Legendre."""
    half = (high - low) / 2
    points = (low + half)[:, None] + half[:, None] * _NODES
    return half * (f(points) @ _WEIGHTS)


def solve(bits: int, dim: int = GAUSSIAN) -> Array:
    """Return the positive centroids of the symmetric Lloyd-Max quantizer, (2^(bits-1),) ascending.

    Newton's method on `c_i = E[u | cell i]`, whose Jacobian is tridiagonal because a cell's
    boundaries are the midpoints to its neighbours.
    """
    density, end = _density(dim)
    count = 2 ** (bits - 1)
    # Panter-Dite start: quantiles of the cube root of the density
    grid = np.linspace(0, end * (1 - 1e-12), 20001)
    mass = np.cumsum(np.cbrt(density(grid)))
    centroids = np.interp((np.arange(count) + 0.5) / count, mass / mass[-1], grid)
    for _ in range(100):
        inner = (centroids[1:] + centroids[:-1]) / 2
        low, high = np.concatenate([[0.0], inner]), np.concatenate([inner, [end]])
        weight = _integrate(density, low, high)
        mean = _integrate(lambda u: u * density(u), low, high) / weight
        residual = centroids - mean
        # d mean_i / d high_i = f(high_i) (high_i - mean_i) / weight_i, and likewise for low_i
        up = density(inner) * (inner - mean[:-1]) / weight[:-1]
        down = density(inner) * (mean[1:] - inner) / weight[1:]
        jacobian = np.eye(count)
        jacobian -= 0.5 * (np.diag(np.append(up, 0.0)) + np.diag(np.append(0.0, down)))
        jacobian -= 0.5 * (np.diag(up, 1) + np.diag(down, -1))
        step = np.linalg.solve(jacobian, residual)
        proposal = centroids - step
        if np.any(np.diff(proposal) <= 0) or proposal[0] <= 0 or proposal[-1] >= end:
            proposal = mean  # far from the solution: a plain Lloyd step never leaves the order
        centroids = proposal
        if np.max(np.abs(residual)) < 1e-14:
            break
    return centroids


def distortion(centroids: Array, dim: int = GAUSSIAN) -> float:
    """Return E[(u - c(u))^2] / E[u^2] of a symmetric quantizer given its positive centroids."""
    density, end = _density(dim)
    inner = (centroids[1:] + centroids[:-1]) / 2
    low, high = np.concatenate([[0.0], inner]), np.concatenate([inner, [end]])
    error = _integrate(lambda u: (u - centroids[:, None]) ** 2 * density(u), low, high).sum()
    edges = np.linspace(0, end, 65)
    power = _integrate(lambda u: u * u * density(u), edges[:-1], edges[1:]).sum()
    return float(error / power)


def round_to_e4m3(x: Array) -> Array:
    """Round to the nearest fp8 e4m3 value (3 mantissa bits; normal range only)."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 16) / 16, exponent)


def solve_e4m3(bits: int) -> tuple[Array, float]:
    """Return positive e4m3 centroids and the unit g that makes g * centroids nearly Lloyd-Max.

    g is searched over one octave: scaling by two only moves the exponents.
    """
    exact = solve(bits)
    units = np.exp2(-np.arange(512) / 512)
    losses = [distortion(g * round_to_e4m3(exact / g)) for g in units]
    unit = float(units[int(np.argmin(losses))])
    return round_to_e4m3(exact / unit), unit


def main() -> None:
    """Solve all tables; each row holds the positive centroids of 1, 2, ... bits in turn."""
    rows = [np.concatenate([solve(b, dim) for b in range(1, MAX_BITS + 1)]) for dim in TABLE_DIMS]
    snapped = [solve_e4m3(bits) for bits in range(1, E4M3_MAX_BITS + 1)]
    DATA_FILE.parent.mkdir(exist_ok=True)
    np.savez(
        DATA_FILE,
        dims=np.array(TABLE_DIMS, np.int32),
        centroids=np.stack(rows),
        e4m3_centroids=np.concatenate([centroids for centroids, _ in snapped]),
        e4m3_units=np.array([unit for _, unit in snapped]),
    )


if __name__ == "__main__":
    main()
