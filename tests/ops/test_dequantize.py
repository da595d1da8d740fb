"""`dequantize` against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.numerics.encode import decode
from quantforge.numerics.hadamard import hadamard_matrix
from quantforge.numerics.lloyd_max import distortion, solve
from quantforge.ops import dequantize
from quantforge.ops.dequantize import op
from quantforge.ops.dequantize.reference import dequantize as reference
from quantforge.ops.transform import butterfly, rotate, unrotate
from quantforge.spec import QuantSpec, hadamard_base
from tests.helpers import (
    LAYOUTS,
    ODD_SIZES,
    Statistic,
    assert_close,
    gaussian,
    make_store,
    spec_of,
    to_float64,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def test_oracle_by_hand() -> None:
    """One bit, dim 2: H = [[1, 1], [1, -1]], centroids +-c; codes [1, 0] stand for (c, -c)."""
    store = make_store(QuantSpec(2, 1, scale_dtype="float32"), 1)
    store.encoded.packed[:] = [[0b01, 0, 0, 0]]
    store.encoded.scales[:] = 2.0
    signs = np.array([1.0, -1.0])  # RandomState(0).randint(0, 2, 2) is [0, 1]
    centroid = 8 / (3 * np.pi)  # E|u| in the nearest dim of the table, 4
    rotated = 2.0 * centroid * np.array([1.0, -1.0])
    expected = signs * (np.array([[1, 1], [1, -1]]) @ rotated) / np.sqrt(2)
    # the density of dim 4 ends like a square root: quadrature has the centroid to 1e-6
    np.testing.assert_allclose(
        reference(store.encoded, store.spec)[0], expected, rtol=2e-6, atol=1e-12
    )


@pytest.mark.parametrize("estimator", ["mse", "prod"])
@pytest.mark.parametrize("dim", [1, 2, 12, 63, 64, 80, 96, 100, 127, 128, 384])
@pytest.mark.parametrize("bits", range(1, 9))
def test_against_oracle(bits: int, dim: int, estimator: str, device: torch.device) -> None:
    if estimator == "prod" and bits == 1:
        estimator = "mse"
    store = make_store(spec_of(dim, bits, estimator=estimator), 70, device=device)
    got = dequantize(store.packed, store.scales, store.spec)
    assert_close(got, [store.naive], store.exact)


@pytest.mark.parametrize("dim", [1280, 1536, 4096])
@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_large_dims(dim: int, estimator: str, device: torch.device) -> None:
    spec = QuantSpec(dim, 4, estimator=estimator)  # type: ignore[arg-type]
    store = make_store(spec, 9, statistic="shared", device=device)
    got = dequantize(store.packed, store.scales, store.spec, **store.statistics)
    assert_close(got, [store.naive], store.exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("dim", [8, 24, 64, 128, 640, 768, 1024, 1536])
def test_half_precision(dim: int, bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """Where a kernel transforms two numbers at a time."""
    store = make_store(QuantSpec(dim, bits), 2, 37, device=device)
    got = dequantize(store.packed, store.scales, store.spec, dtype=dtype)
    assert_close(got, [store.naive], store.exact)


@pytest.mark.parametrize("codebook", ["e4m3", "gaussian"])
def test_codebooks(codebook: str, device: torch.device) -> None:
    store = make_store(QuantSpec(128, 4, codebook=codebook), 50, device=device)  # type: ignore[arg-type]
    assert_close(dequantize(store.packed, store.scales, store.spec), [store.naive], store.exact)


@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_scales_beyond_fp16(estimator: str, device: torch.device) -> None:
    spec = QuantSpec(64, 4, estimator=estimator, scale_dtype="float32")  # type: ignore[arg-type]
    store = make_store(spec, 40, device=device, magnitude=1e6)
    assert_close(dequantize(store.packed, store.scales, spec), [store.naive], store.exact)


@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_and_dtypes(
    dtype: torch.dtype, statistic: Statistic, device: torch.device
) -> None:
    store = make_store(QuantSpec(96, 3), 2, 3, 40, statistic=statistic, device=device)
    got = dequantize(store.packed, store.scales, store.spec, **store.statistics, dtype=dtype)
    assert got.dtype == dtype
    if dtype == torch.float64:  # computed in float32
        got = got.float()
    assert_close(got, [store.naive], store.exact)


@pytest.mark.parametrize("n", [*ODD_SIZES, 9001])
@pytest.mark.parametrize("statistic", ["shared", "per_head"])
def test_numbers_of_vectors(n: int, statistic: Statistic, device: torch.device) -> None:
    store = make_store(QuantSpec(64, 4), 2, n, statistic=statistic, device=device)
    got = dequantize(store.packed, store.scales, store.spec, **store.statistics)
    assert_close(got, [store.naive], store.exact)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 1, 2, 5)])
def test_leading_axes(lead: tuple[int, ...], device: torch.device) -> None:
    store = make_store(QuantSpec(64, 5), *lead, device=device)
    assert_close(dequantize(store.packed, store.scales, store.spec), [store.naive], store.exact)


@pytest.mark.parametrize("dim", [64, 100])
@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_layouts(layout: str, bits: int, dim: int, device: torch.device) -> None:
    spec = spec_of(dim, bits, estimator="prod")
    store = make_store(spec, 2, 3, 50, statistic="per_head", device=device)
    packed, scales = (LAYOUTS[layout](t) for t in (store.packed, store.scales))
    got = dequantize(packed, scales, store.spec, **store.statistics)
    assert_close(got, [store.naive], store.exact)


@pytest.mark.parametrize("dim", [63, 97])
@pytest.mark.parametrize("bits", range(1, 9))
def test_padding_bits_are_not_read(bits: int, dim: int, device: torch.device) -> None:
    store = make_store(spec_of(dim, bits), 30, device=device)
    zeros = make_store(spec_of(dim, bits), 30, seed=5)
    everything = np.bitwise_or.reduce(
        np.concatenate([store.encoded.packed, zeros.encoded.packed]), axis=0
    )
    never_set = torch.from_numpy(~everything).to(device)  # padding bytes and unused fields
    assert bool(never_set.any())
    got = dequantize(store.packed | never_set, store.scales, store.spec)
    assert torch.equal(got, dequantize(store.packed, store.scales, store.spec))


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_that_of_the_rate(bits: int, device: torch.device) -> None:
    """End to end: what comes back is the input, to the accuracy of the codes."""
    store = make_store(QuantSpec(128, bits), 500, statistic="shared", device=device)
    got = to_float64(dequantize(store.packed, store.scales, store.spec, **store.statistics))
    assert store.equalizer_array is not None
    original = gaussian(500, 128)
    error = (got - store.shift_array) / store.equalizer_array - original
    assert np.square(error).mean() == pytest.approx(distortion(solve(bits, 128), 128), rel=0.1)


@pytest.mark.parametrize("dim", [1, 12, 64, 80, 96, 112, 1536])
def test_butterfly_is_the_dense_matrix(dim: int, device: torch.device) -> None:
    base = hadamard_base(dim)
    assert base is not None
    dense = hadamard_matrix((dim // base).bit_length() - 1, base).astype(np.int64)
    x = np.random.RandomState(dim).randint(-99, 100, (dim, 7))  # sums are exact integers
    for transpose, matrix in ((False, dense), (True, dense.T)):
        columns = torch.from_numpy(x).to(device, torch.float32)
        got = butterfly(columns, transpose=transpose)
        np.testing.assert_array_equal(to_float64(got), matrix @ x)


@pytest.mark.parametrize("dim", [63, 64, 1280])
def test_unrotate_inverts_rotate(dim: int, device: torch.device) -> None:
    spec = spec_of(dim, 4)
    x = torch.from_numpy(gaussian(2, 5, dim)).to(device)
    y = rotate(x, spec, 3)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(unrotate(y, spec, 3), x)


def _arguments(**changes: object) -> dict:
    store = make_store(QuantSpec(64, 4), 2, 5)
    return {"packed": store.packed, "scales": store.scales, "spec": store.spec, **changes}


BYTES = torch.zeros(2, 5, 32, dtype=torch.uint8)
SCALES = torch.zeros(2, 5, 1, dtype=torch.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": BYTES[..., :31]}, r"rows of 32 bytes.*got.*\(2, 5, 31\)"),
        ({"packed": BYTES.to(torch.int8)}, "uint8.*got torch.int8"),
        ({"packed": BYTES[0, 0, 0]}, r"32 bytes.*got.*\(\)"),
        ({"scales": SCALES[..., 0]}, r"float16 of shape \(2, 5, 1\).*got.*\(2, 5\)"),
        ({"scales": SCALES.float()}, "float16.*got torch.float32"),
        ({"scales": SCALES.expand(2, 5, 2)}, r"\(2, 5, 1\).*got.*\(2, 5, 2\)"),
        ({"spec": QuantSpec(64, 4, estimator="prod")}, r"\(2, 5, 2\); got.*\(2, 5, 1\)"),
        ({"spec": QuantSpec(64, 4, scale_dtype="float32")}, "float32.*got torch.float16"),
        ({"shift": torch.ones(3, 1, 64)}, r"shift.*\(2, 5, 64\).*got \(3, 1, 64\)"),
        ({"equalizer": torch.ones(32)}, r"equalizer.*\(64,\).*got \(32,\)"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dequantize(**_arguments(**changes))


@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, statistic: Statistic, device: torch.device) -> None:
    store = make_store(QuantSpec(96, 3), 2, 7, statistic=statistic, device=device)
    arguments = (store.packed, store.scales, *store.statistics.values(), store.spec.key, dtype)
    torch.library.opcheck(op.dequantize, arguments)


def test_decode_is_the_reference() -> None:
    assert reference is decode


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "bits", "estimator", "dtype"),
    [
        (64, 4, "mse", torch.float16),
        (80, 3, "mse", torch.bfloat16),
        (96, 4, "mse", torch.bfloat16),
        (96, 8, "prod", torch.float32),
        (112, 2, "mse", torch.float32),
        (128, 4, "mse", torch.bfloat16),
        (128, 3, "prod", torch.float32),
        (256, 2, "mse", torch.float16),
        (384, 5, "mse", torch.float64),
        (768, 4, "mse", torch.float32),
        (1024, 8, "mse", torch.bfloat16),
        (1536, 4, "mse", torch.float32),
        (2048, 6, "mse", torch.float32),
        (4096, 4, "prod", torch.float32),
    ],
)
def test_kernel_against_oracle(bits: int, dim: int, estimator: str, dtype: torch.dtype) -> None:
    """The kernel by name: "auto" may choose eager torch, an explicit choice never does."""
    device = torch.device("cuda")
    spec = QuantSpec(dim, bits, estimator=estimator)  # type: ignore[arg-type]
    store = make_store(spec, 3, 90, statistic="per_head", device=device)
    got = dequantize(
        store.packed, store.scales, spec, **store.statistics, dtype=dtype, impl="triton"
    )
    assert got.dtype == dtype
    assert_close(got.float() if dtype == torch.float64 else got, [store.naive], store.exact)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("dim", "rows"), [(128, 2**24 + 77), (96, 2**25 - 9)])
def test_more_than_two_to_the_31_numbers(dim: int, rows: int) -> None:
    spec, device = QuantSpec(dim, 8), torch.device("cuda")
    packed = torch.randint(0, 256, (rows, dim), device=device, dtype=torch.uint8)
    scales = torch.rand(rows, 1, device=device).half()
    got = dequantize(packed, scales, spec, dtype=torch.bfloat16, impl="triton")
    assert got.numel() > 2**31
    middle = 2**31 // dim
    for part in (slice(0, 300), slice(middle - 150, middle + 150), slice(rows - 300, rows)):
        alone = dequantize(packed[part], scales[part], spec, dtype=torch.bfloat16, impl="triton")
        assert torch.equal(got[part], alone)
        eager = dequantize(packed[part], scales[part], spec, impl="eager")
        assert (alone.float() - eager).norm() < 2**-8 * eager.norm()
