"""The Lloyd-Max solver against the literature, and the stored tables against the solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.numerics.codebook import load_codebook
from quantforge.numerics.lloyd_max import (
    DATA_FILE,
    GAUSSIAN,
    TABLE_DIMS,
    distortion,
    round_to_e4m3,
    solve,
    solve_e4m3,
)

BITS = range(1, 9)
# J. Max, "Quantizing for minimum distortion", 1960, table I; also arXiv 2504.19874, section 3.1
GAUSSIAN_DISTORTION = {1: 0.3634, 2: 0.11748, 3: 0.03455, 4: 0.00950}
E4M3_DISTORTION = {2: 0.117482, 3: 0.034589, 4: 0.009568}


def _full(positive: np.ndarray) -> np.ndarray:
    return np.concatenate([-positive[::-1], positive])


@pytest.mark.parametrize("bits", GAUSSIAN_DISTORTION)
def test_distortion_of_the_literature(bits: int) -> None:
    expected = GAUSSIAN_DISTORTION[bits]
    digits = 4 if bits == 1 else 5
    assert round(distortion(solve(bits)), digits) == expected


def test_one_bit_is_closed_form() -> None:
    np.testing.assert_allclose(solve(1), [np.sqrt(2 / np.pi)], rtol=1e-13)
    assert distortion(solve(1)) == pytest.approx(1 - 2 / np.pi, rel=1e-12)
    # in three dimensions a coordinate of a unit vector is uniform: u on [-sqrt 3, sqrt 3]
    for bits in BITS:
        cells = 2**bits
        uniform = np.sqrt(3) * (2 * np.arange(cells // 2) + 1) / cells
        np.testing.assert_allclose(solve(bits, 3), uniform, rtol=1e-9)
        assert distortion(uniform, 3) == pytest.approx(4.0**-bits, rel=1e-12)


@pytest.mark.parametrize("dim", [8, 64, 1536, GAUSSIAN])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_centroids_are_cell_means(bits: int, dim: int) -> None:
    """The Lloyd condition by a midpoint sum, which shares no code with the solver."""
    positive = solve(bits, dim)
    end = 12.0 if dim == GAUSSIAN else min(12.0, np.sqrt(dim))
    u = (np.arange(2_000_000) + 0.5) * (end / 2_000_000)
    density = np.exp(-u * u / 2) if dim == GAUSSIAN else (1 - u * u / dim) ** ((dim - 3) / 2)
    cell = np.searchsorted((positive[1:] + positive[:-1]) / 2, u)
    mean = np.bincount(cell, density * u) / np.bincount(cell, density)
    # u lands in the wrong cell for at most one step at each boundary
    np.testing.assert_allclose(positive, mean, atol=end / 2_000_000)


def test_tables_are_what_the_solver_gives() -> None:
    with np.load(DATA_FILE) as data:
        assert tuple(data["dims"]) == TABLE_DIMS
        for dim, row in zip(TABLE_DIMS, data["centroids"], strict=True):
            fresh = np.concatenate([solve(bits, dim) for bits in BITS])
            assert np.abs(row - fresh).max() <= 1e-9, dim
        fresh_e4m3 = [solve_e4m3(bits) for bits in range(1, 6)]
        np.testing.assert_array_equal(
            data["e4m3_centroids"], np.concatenate([centroids for centroids, _ in fresh_e4m3])
        )
        np.testing.assert_array_equal(data["e4m3_units"], [unit for _, unit in fresh_e4m3])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 100, 128, 1536])
def test_codebook_structure(bits: int, dim: int) -> None:
    book = load_codebook("lloyd_max", bits, dim)
    assert book.centroids.shape == (2**bits,)
    assert book.boundaries.shape == (2**bits - 1,)
    assert book.centroids.dtype == book.boundaries.dtype == np.float32
    assert (np.diff(book.centroids) > 0).all()
    np.testing.assert_array_equal(book.centroids, -book.centroids[::-1])
    middle = (book.centroids[1:].astype(np.float64) + book.centroids[:-1]) / 2
    moved = 2.0 ** (bits - 23) * np.abs(middle) + 2**-23 * book.centroids.max()
    assert (np.abs(book.boundaries - middle) <= moved).all()
    numbers = book.boundaries.view(np.int32) & (2**bits - 1)
    np.testing.assert_array_equal(numbers, np.arange(2**bits - 1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [TABLE_DIMS[0], 64, 128, 384, 4096])
def test_tabulated_dims_use_their_own_table(bits: int, dim: int) -> None:
    book = load_codebook("lloyd_max", bits, dim)
    np.testing.assert_array_equal(book.centroids, _full(solve(bits, dim)).astype(np.float32))


def test_gaussian_codebook_ignores_dim() -> None:
    for bits in BITS:
        book = load_codebook("gaussian", bits, 8)
        np.testing.assert_allclose(book.centroids, _full(solve(bits)), rtol=1e-6)


UNTABULATED = (74, 88, 100, 120, 144, 176, 224, 320, 448, 640, 896, 1152, 1280, 1792, 3072, 3584)


@pytest.mark.parametrize("dim", [*UNTABULATED, 5120, 8192, 12288, 100_000])
@pytest.mark.parametrize("bits", BITS)
def test_nearest_table_costs_less_than_1e_4(bits: int, dim: int) -> None:
    book = load_codebook("lloyd_max", bits, dim)
    used = book.centroids[2 ** (bits - 1) :].astype(np.float64)
    best = distortion(solve(bits, dim), dim)
    assert best <= distortion(used, dim) * (1 + 1e-12)  # the solver's is the optimum
    assert distortion(used, dim) < best * (1 + 1e-4)


@pytest.mark.parametrize("dim", [9, 11, 18, 36, 45, 72])  # the worst of their neighbourhoods
@pytest.mark.parametrize("bits", BITS)
def test_nearest_table_of_a_small_dim_costs_less_than_1_5_percent(bits: int, dim: int) -> None:
    book = load_codebook("lloyd_max", bits, dim)
    used = book.centroids[2 ** (bits - 1) :].astype(np.float64)
    assert distortion(used, dim) < distortion(solve(bits, dim), dim) * 1.015


@pytest.mark.parametrize("bits", range(1, 6))
def test_e4m3_centroids_are_fp8(bits: int) -> None:
    book = load_codebook("e4m3", bits, 128)
    values = torch.from_numpy(book.centroids)
    assert torch.equal(values.to(torch.float8_e4m3fn).float(), values)
    assert (np.diff(book.centroids) > 0).all()
    # nearest-neighbour boundaries, in units of u: the ratio to midpoints is the unit
    midpoints = (book.centroids[1:] + book.centroids[:-1]) / 2
    outer = midpoints != 0
    unit = book.boundaries[outer] / midpoints[outer]
    assert np.ptp(unit) <= 2.0 ** (bits - 22) if unit.size else bits == 1


@pytest.mark.parametrize("bits", E4M3_DISTORTION)
def test_e4m3_distortion(bits: int) -> None:
    centroids, unit = solve_e4m3(bits)
    assert distortion(unit * centroids) == pytest.approx(E4M3_DISTORTION[bits], abs=1e-5)


def test_round_to_e4m3_is_torch() -> None:
    x = np.exp2(np.random.RandomState(0).uniform(-6, 8, 10_000)).astype(np.float32)
    expected = torch.from_numpy(x).to(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(round_to_e4m3(x.astype(np.float64)), expected)
