"""The kernel of `dequantize` on the CPU, by Triton's interpreter, against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import UnsupportedError
from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.packing import unpack
from quantforge.ops import dequantize
from quantforge.spec import QuantSpec
from tests.helpers import LAYOUTS, Statistic, assert_close, make_store, scattered
from tests.interpreter import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")


CASES = [(dim, bits, "mse") for dim in (8, 64) for bits in range(1, 9)]
CASES += [(dim, bits, "mse") for dim in (24, 80, 96, 112, 128) for bits in (1, 3, 4)]
CASES += [(dim, bits, "prod") for dim in (64, 80, 112) for bits in (2, 4, 8)]
CASES += [(768, 4, "mse"), (1536, 5, "mse"), (2048, 7, "mse")]


@pytest.mark.parametrize(("dim", "bits", "estimator"), CASES)
@pytest.mark.usefixtures("poison")
def test_against_oracle(dim: int, bits: int, estimator: str) -> None:
    store = make_store(QuantSpec(dim, bits, estimator=estimator), 6)  # type: ignore[arg-type]
    got = dequantize(store.packed, store.scales, store.spec, impl="triton")
    assert_close(got, [store.naive], store.exact)


@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_statistics_and_dtypes(dtype: torch.dtype, statistic: Statistic, dim: int) -> None:
    store = make_store(QuantSpec(dim, 3), 2, 3, 5, statistic=statistic)
    got = dequantize(
        store.packed, store.scales, store.spec, **store.statistics, dtype=dtype, impl="triton"
    )
    assert got.dtype == dtype
    assert_close(got.float() if dtype == torch.float64 else got, [store.naive], store.exact)


@pytest.mark.parametrize(("dim", "n"), [(64, 0), (64, 1), (64, 300), (96, 1), (96, 130)])
def test_numbers_of_vectors(n: int, dim: int) -> None:
    store = make_store(QuantSpec(dim, 4), 2, n, statistic="per_head")
    got = dequantize(store.packed, store.scales, store.spec, **store.statistics, impl="triton")
    assert_close(got, [store.naive], store.exact)


@pytest.mark.parametrize("lead", [(), (2, 1, 2, 5)])
def test_leading_axes(lead: tuple[int, ...]) -> None:
    store = make_store(QuantSpec(64, 5), *lead)
    got = dequantize(store.packed, store.scales, store.spec, impl="triton")
    assert_close(got, [store.naive], store.exact)


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_layouts(layout: str, bits: int, dim: int) -> None:
    store = make_store(QuantSpec(dim, bits, estimator="prod"), 2, 3, 5, statistic="per_head")
    packed, scales = (LAYOUTS[layout](t) for t in (store.packed, store.scales))
    got = dequantize(packed, scales, store.spec, **store.statistics, impl="triton")
    assert_close(got, [store.naive], store.exact)


@pytest.mark.parametrize("dim", [64, 80])
def test_only_its_rows_are_read(dim: int) -> None:
    """Garbage on all sides of the rows, scales of NaN among it, changes nothing."""
    store = make_store(QuantSpec(dim, 4), 5)
    clean = dequantize(store.packed, store.scales, store.spec, impl="triton")
    packed, scales = scattered(store.packed), scattered(store.scales)
    assert torch.equal(dequantize(packed, scales, store.spec, impl="triton"), clean)


@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rotated(bits: int, dim: int) -> None:
    """Without the transform: every number is its centroid times the scale."""
    from quantforge.ops.kernels.dequantize_launch import decode_rotated

    store = make_store(QuantSpec(dim, bits), 2, 3, 5)
    out = torch.full((2, 3, 5, dim), torch.nan)
    decode_rotated(out, store.packed, store.scales, store.spec)
    codes = unpack(store.encoded.packed, dim, bits)
    expected = codebook_of(store.spec).centroids[codes] * store.encoded.scales.astype(np.float32)
    np.testing.assert_array_equal(out.numpy(), expected)


def test_qr_is_refused() -> None:
    store = make_store(QuantSpec(100, rotation="qr"), 3)
    with pytest.raises(UnsupportedError, match="Hadamard rotations only, not qr"):
        dequantize(store.packed, store.scales, store.spec, impl="triton")
