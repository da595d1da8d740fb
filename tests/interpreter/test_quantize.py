"""The kernel of `quantize` on the CPU, by Triton's interpreter: bit for bit the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import InputError, UnsupportedError
from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.encode import encode
from quantforge.ops import quantize
from quantforge.spec import QuantSpec, codebook_text
from tests.helpers import LAYOUTS, Statistic, assert_same_bits, gaussian, statistics_of
from tests.interpreter import INTERPRET
from tests.ops.test_quantize import _adversarial

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")


def _check(
    x: np.ndarray,
    spec: QuantSpec,
    shift: np.ndarray | None = None,
    equalizer: np.ndarray | None = None,
    view: torch.Tensor | None = None,
) -> None:
    tensors = [None if s is None else torch.from_numpy(s) for s in (shift, equalizer)]
    got = quantize(
        torch.from_numpy(x) if view is None else view,
        spec,
        shift=tensors[0],
        equalizer=tensors[1],
        impl="triton",
    )
    assert_same_bits(*got, encode(x, spec, shift, equalizer))


CASES = [(dim, bits) for dim in (8, 64, 2048) for bits in range(1, 9)]
CASES += [(dim, bits) for dim in (24, 80, 96, 112, 128, 256) for bits in (1, 3, 4)]
CASES += [(192, 6), (768, 4), (768, 8), (1536, 2), (1280, 5), (896, 7)]


@pytest.mark.parametrize(("dim", "bits"), CASES)
@pytest.mark.usefixtures("poison")
def test_bits_and_dims(dim: int, bits: int) -> None:
    _check(gaussian(5, dim, seed=bits), QuantSpec(dim, bits, seed=bits))


@pytest.mark.parametrize("rule", ["unbiased", "norm", "mse"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dim", [8, 64, 96])
def test_adversarial(dim: int, bits: int, rule: str) -> None:
    spec = QuantSpec(dim, bits, scale_rule=rule, scale_dtype="float32")  # type: ignore[arg-type]
    x = _adversarial(dim)
    with np.errstate(over="ignore", invalid="ignore"):
        _check(x[:: max(1, len(x) // 64)], spec)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_residual(bits: int, scale_dtype: str) -> None:
    spec = QuantSpec(64, bits, estimator="prod", scale_dtype=scale_dtype)  # type: ignore[arg-type]
    _check(gaussian(9, 64), spec)


@pytest.mark.parametrize("codebook", ["e4m3", "gaussian"])
def test_codebooks(codebook: str) -> None:
    _check(gaussian(7, 128), QuantSpec(128, 4, codebook=codebook))  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes(dtype: type, dim: int) -> None:
    _check(np.random.RandomState(0).standard_normal((9, dim)).astype(dtype), QuantSpec(dim, 4))


@pytest.mark.parametrize(("dim", "n"), [(64, 0), (64, 1), (64, 300), (96, 0), (96, 3), (96, 130)])
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_numbers_of_vectors(n: int, statistic: Statistic, dim: int) -> None:
    shift, equalizer = statistics_of(statistic, (2, 3), dim)
    x = gaussian(2, 3, n, dim)
    if n == 0:
        packed, scales = quantize(torch.from_numpy(x), QuantSpec(dim), impl="triton")
        assert (packed.shape, scales.shape) == ((2, 3, 0, dim // 2), (2, 3, 0, 1))
    else:
        _check(x, QuantSpec(dim), shift, equalizer)


@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("statistic", ["none", "per_head"])
@pytest.mark.usefixtures("poison")
def test_layouts(statistic: Statistic, layout: str, dim: int) -> None:
    """Views amid NaN: what lies outside the rows is not read into them."""
    shift, equalizer = statistics_of(statistic, (2, 3), dim)
    x = gaussian(2, 3, 5, dim)
    _check(x, QuantSpec(dim, 3), shift, equalizer, LAYOUTS[layout](torch.from_numpy(x)))


@pytest.mark.parametrize("lead", [(), (1,), (3, 2), (2, 1, 2, 5)])
def test_leading_axes(lead: tuple[int, ...]) -> None:
    _check(gaussian(*lead, 64), QuantSpec(64))


def test_heads_before_tokens() -> None:
    """Keys as a model makes them: (B, S, H, D), seen as (B, H, S, D)."""
    x = gaussian(2, 7, 3, 64)
    shift, equalizer = statistics_of("per_head", (2, 3), 64)
    view = torch.from_numpy(x).transpose(1, 2)
    _check(x.transpose(0, 2, 1, 3), QuantSpec(64), shift, equalizer, view)


def test_bad_values_are_named() -> None:
    x = torch.from_numpy(gaussian(4, 64))
    x[2, 5] = torch.nan
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match="vector 2 holds NaN"):
        quantize(x, QuantSpec(64), impl="triton")


@pytest.mark.parametrize(
    ("x", "spec", "reason"),
    [
        (torch.ones(3, 100), QuantSpec(100, rotation="qr"), "Hadamard rotations only, not qr"),
        (torch.ones(3, 64), QuantSpec(64, 1, codebook="centroids:-1,2"), "not symmetric"),
        (torch.ones(3, 4), QuantSpec(4), "dim 4"),
        (torch.ones(2, 3, 4, 5, 6, 64).permute(2, 0, 3, 1, 4, 5), QuantSpec(64), "axes"),
    ],
)
def test_reasons(x: torch.Tensor, spec: QuantSpec, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        quantize(x, spec, impl="triton")


@pytest.mark.parametrize("half", [(0.4,), (0.2, 1.7), (0.1, 0.5, 0.6, 3.0)])
def test_own_symmetric_codebooks(half: tuple[float, ...]) -> None:
    centroids = (*(-c for c in reversed(half)), *half)
    bits = len(centroids).bit_length() - 1
    spec = QuantSpec(64, bits, codebook=codebook_text(centroids), scale_rule="mse")
    x = gaussian(70, 64, seed=bits)
    packed, scales = quantize(torch.from_numpy(x), spec, impl="triton")
    assert_same_bits(packed, scales, encode(x, spec))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [64, 4096])
def test_codes_beside_boundaries(dim: int, bits: int) -> None:
    """The lookup against a search, at every boundary and the floats around it."""
    from quantforge.ops.kernels.codebook import cells_of

    spec = QuantSpec(dim, bits)
    bounds = codebook_of(spec).boundaries
    cells = cells_of(spec, torch.device("cpu"))
    table = cells.table.numpy()
    end = np.float32(dim**0.5)
    u = np.concatenate([bounds, np.nextafter(bounds, -end), np.nextafter(bounds, end), [-end, end]])
    for magic in (np.float32(1.5 * 2**23), np.float64(1.5 * 2**23)):  # rounded twice, or once
        cell = (u * type(magic)(cells.slope) + magic).astype(np.float32).view(np.int32)
        cell &= cells.size - 1
        below = table[cells.size :][cell].view(np.int32)
        codes = below + (u > table[cell])
        np.testing.assert_array_equal(codes, np.searchsorted(bounds, u, side="left"))


@pytest.mark.parametrize("codebook", ["lloyd_max", "gaussian", "e4m3"])
@pytest.mark.parametrize("bits", range(1, 5))
@pytest.mark.parametrize("dim", [8, 96, 4096])
def test_codes_beside_boundaries_by_lanes(dim: int, bits: int, codebook: str) -> None:
    """The same for the table in the lanes of a warp: its arithmetic, repeated in numpy."""
    from quantforge.ops.kernels.codebook import lane_cells_of

    spec = QuantSpec(dim, bits, codebook=codebook)  # type: ignore[arg-type]
    book = codebook_of(spec)
    cells = lane_cells_of(spec, torch.device("cpu"))
    assert cells.size is None
    word, centroids = cells.table.numpy().reshape(2, 32)
    end = np.float32(dim**0.5)
    near = [np.nextafter(book.boundaries, side) for side in (-end, end)]
    u = np.concatenate([book.boundaries, *near, end * np.linspace(-1, 1, 9999, dtype=np.float32)])
    scaled = u.astype(np.float64) * np.float32(cells.slope / 30) + 0.5
    saturated = scaled.astype(np.float32).clip(0, 1)
    cell = (saturated.astype(np.float64) * 30 + 2**23).astype(np.float32).view(np.int32) & 31
    codes = word.view(np.int32)[cell] + (u > word[cell])  # and bits of boundaries above them
    found = codes & (2**bits - 1)
    np.testing.assert_array_equal(found, np.searchsorted(book.boundaries, u, side="left"))
    np.testing.assert_array_equal(centroids[codes & 31], book.centroids[found])
