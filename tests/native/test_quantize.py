"""Native quantization: bit for bit `numerics.encode` on every level."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import UnsupportedError
from quantforge.numerics.encode import encode
from quantforge.ops import cache_append, dequantize, quantize
from quantforge.ops._library import run
from quantforge.ops.quantize import eager
from quantforge.spec import QuantSpec
from tests.helpers import (
    LAYOUTS,
    ODD_SIZES,
    Statistic,
    assert_close,
    assert_same_bits,
    gaussian,
    make_store,
    statistics_of,
    threads,
    to_numpy,
)
from tests.ops.test_quantize import _adversarial

RULES = ("unbiased", "norm", "mse")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DIMS = (1, 2, 12, 28, 64, 80, 96, 112, 128, 192, 256, 384, 768, 896, 1024, 1536)
ELEMENTS = 1 << 13


def _random(dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    n = -(-ELEMENTS // dim) + seed  # not a multiple of the lanes
    x = gaussian(n, dim, seed=seed) * np.exp(2 * gaussian(n, 1, seed=1))
    x[:, :: max(dim // 4, 1)] *= 8
    return torch.from_numpy(np.clip(x, -3e4, 3e4)).to(dtype)


def test_the_cases_cover_a_million_numbers() -> None:
    assert len(DIMS) * 8 * ELEMENTS >= 10**6


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", DIMS)
def test_codes_are_identical(dim: int, bits: int, level: str) -> None:
    rule, dtype = RULES[bits % 3], DTYPES[(dim + bits) % 4]
    wide = "float32" if dtype == torch.float64 else "float16"
    spec = QuantSpec(dim, bits, seed=dim, scale_rule=rule, scale_dtype=wide)  # type: ignore[arg-type]
    x = _random(dim, dtype, bits)
    assert_same_bits(*quantize(x, spec, impl="native"), encode(to_numpy(x), spec))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [2, 12, 64, 80, 128])
def test_adversarial_codes_are_identical(dim: int, bits: int, rule: str, level: str) -> None:
    x = _adversarial(dim)
    spec = QuantSpec(dim, bits, scale_rule=rule, scale_dtype="float32")  # type: ignore[arg-type]
    # not by the public function, which refuses some of these vectors
    codes = run("quantize", "native", torch.from_numpy(x), None, None, spec.key)
    assert_same_bits(*codes, encode(x, spec))
    half = torch.from_numpy(x).to(torch.float16)
    half = half[(half.abs() < 6e4).all(-1)]
    spec = QuantSpec(dim, bits, scale_rule=rule)  # type: ignore[arg-type]
    assert_same_bits(*quantize(half, spec, impl="native"), encode(to_numpy(half), spec))


@pytest.mark.parametrize("codebook", ["gaussian", "e4m3"])
def test_codebooks(codebook: str, level: str) -> None:
    spec = QuantSpec(128, 5, codebook=codebook)  # type: ignore[arg-type]
    x = _random(128, torch.float32, 3)
    assert_same_bits(*quantize(x, spec, impl="native"), encode(to_numpy(x), spec))


@pytest.mark.parametrize("n", ODD_SIZES)
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_sizes(statistic: Statistic, n: int, level: str) -> None:
    spec = QuantSpec(96, 3)
    store = make_store(spec, 2, n, statistic=statistic)
    x = torch.from_numpy(gaussian(2, n, 96))
    packed, scales = quantize(x, spec, **store.statistics, impl="native")
    if not n:
        assert (packed.numel(), scales.numel()) == (0, 0)
        return
    expected = encode(to_numpy(x), spec, store.shift_array, store.equalizer_array)
    assert_same_bits(packed, scales, expected)


@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_layouts(layout: str, statistic: Statistic, level: str) -> None:
    spec = QuantSpec(64, 5)
    x = gaussian(2, 3, 50, 64)
    shift, equalizer = statistics_of(statistic, (2, 3), 64)
    tensors = [None if s is None else torch.from_numpy(s) for s in (shift, equalizer)]
    view = LAYOUTS[layout](torch.from_numpy(x))
    got = quantize(view, spec, shift=tensors[0], equalizer=tensors[1], impl="native")
    assert_same_bits(*got, encode(x, spec, shift, equalizer))


@pytest.mark.parametrize("count", [1, 2])
def test_threads(count: int, level: str) -> None:
    spec = QuantSpec(128, 4)
    x = gaussian(9001, 128)
    with threads(count):
        packed, scales = quantize(torch.from_numpy(x), spec, impl="native")
        decoded = dequantize(packed, scales, spec, impl="native")
    assert_same_bits(packed, scales, encode(x, spec))
    assert torch.equal(decoded, dequantize(packed, scales, spec, impl="native"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_that_are_not_finite(rule: str, dtype: str, level: str) -> None:
    """The codes of eager torch, and a scale that is not finite where its is not."""
    x = torch.from_numpy(gaussian(100, 64))
    x[3, 5], x[17, 0], x[18, 1], x[99, 63] = torch.nan, torch.inf, -torch.inf, torch.nan
    x[50] *= 1e30  # beyond fp16, not beyond float32
    x[60:70] = 0
    spec = QuantSpec(64, 4, scale_rule=rule, scale_dtype=dtype)  # type: ignore[arg-type]
    want_packed, want_scales = eager.quantize(x, None, None, spec.key)
    packed, scales = torch.empty_like(want_packed), torch.empty_like(want_scales)
    cache_append(packed, scales, x, torch.tensor(0), spec, impl="native")
    assert torch.equal(packed, want_packed)
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [1, 12, 64, 96, 384])
def test_dequantize(dim: int, bits: int, level: str) -> None:
    store = make_store(QuantSpec(dim, bits), 2, 37, statistic="per_head")
    for dtype in DTYPES:
        got = dequantize(
            store.packed, store.scales, store.spec, **store.statistics, dtype=dtype, impl="native"
        )
        assert_close(got, [store.naive], store.exact)


@pytest.mark.parametrize("statistic", ["shared", "per_head"])
def test_append_writes_its_rows_and_no_others(statistic: Statistic, level: str) -> None:
    spec = QuantSpec(96, 4)
    store = make_store(spec, 2, 3, 21, statistic=statistic)
    x = gaussian(2, 3, 21, 96)
    width = store.packed.shape[-1]
    packed = torch.full((2, 3, 64, width + 8), 0xA5, dtype=torch.uint8)[..., :width]
    scales = torch.full((2, 3, 64, 1), torch.nan, dtype=torch.float16)
    versions = packed._version, scales._version
    position = torch.tensor(40)
    cache_append(
        packed, scales, torch.from_numpy(x), position, spec, **store.statistics, impl="native"
    )
    assert (packed._version, scales._version) > versions, "autograd must see the write"
    expected = encode(x, spec, store.shift_array, store.equalizer_array)
    assert_same_bits(packed[:, :, 40:61], scales[:, :, 40:61], expected)
    outside = torch.ones(64, dtype=torch.bool)
    outside[40:61] = False
    assert (packed._base[:, :, outside] == 0xA5).all()
    assert (packed._base[..., width:] == 0xA5).all()
    assert scales[:, :, outside].isnan().all()


@pytest.mark.parametrize(
    ("spec", "dtype", "reason"),
    [
        (QuantSpec(64, 4, estimator="prod"), torch.float32, "QJL"),
        (QuantSpec(63, 4, rotation="qr"), torch.float32, "Hadamard rotations only, not qr"),
        (QuantSpec(64, 4), torch.float8_e4m3fn, "float8_e4m3fn"),
    ],
)
def test_what_is_not_supported(spec: QuantSpec, dtype: torch.dtype, reason: str) -> None:
    x = torch.ones(3, spec.dim).to(dtype)
    with pytest.raises(UnsupportedError, match=f'quantize with impl="native".*{reason}.*auto'):
        quantize(x, spec, impl="native")
