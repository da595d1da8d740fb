"""`quantize`: bit for bit the numpy definition on every device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.numerics.encode import encode
from quantforge.numerics.packing import pack, row_bytes, unpack
from quantforge.ops import dequantize, quantize
from quantforge.ops.quantize import op
from quantforge.ops.quantize.reference import quantize as reference
from quantforge.spec import QuantSpec
from tests.helpers import (
    LAYOUTS,
    Statistic,
    assert_same_bits,
    gaussian,
    make_store,
    spec_of,
    statistics_of,
    threads,
    to_numpy,
)
from tests.numerics.test_encode import golden_input, golden_specs


@dataclass(frozen=True)
class Random:
    """Some random vectors whose codes must be the same bits on every backend."""

    dim: int
    bits: int
    dtype: torch.dtype
    elements: int = 1 << 19
    statistic: Statistic = "none"
    spec: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        fields = [*self.spec.values(), *([] if self.statistic == "none" else [self.statistic])]
        return "-".join([str(self.dim), str(self.bits), str(self.dtype)[6:], *fields])


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PLAN = (
    Random(64, 1, F32),
    Random(64, 4, BF16, statistic="per_head"),
    Random(80, 2, F16, spec={"scale_rule": "mse"}),
    Random(96, 3, F32, spec={"scale_rule": "norm"}),
    Random(96, 8, BF16),
    Random(112, 5, F32, statistic="shared"),
    Random(128, 4, F16),
    Random(128, 4, BF16, statistic="per_head"),
    Random(128, 3, F32, spec={"codebook": "e4m3", "scale_rule": "norm"}),
    Random(128, 4, F32, spec={"estimator": "prod"}),
    Random(192, 6, F16, statistic="shared"),
    Random(256, 7, F32),
    Random(256, 5, BF16, spec={"codebook": "e4m3"}),
    Random(384, 4, F32, statistic="shared"),
    Random(384, 2, F16, spec={"estimator": "prod"}),
    Random(640, 4, F32, spec={"scale_dtype": "float32"}),
    Random(768, 8, F32),
    Random(768, 4, F16, statistic="shared", spec={"scale_rule": "mse"}),
    Random(896, 3, BF16),
    Random(1024, 1, F32, spec={"codebook": "gaussian"}),
    Random(1536, 4, F32),
    Random(1536, 5, F32, spec={"estimator": "prod", "scale_dtype": "float32"}),
    Random(4096, 4, F16),
)


def test_the_plan_covers_ten_million_numbers() -> None:
    assert sum(case.elements // case.dim * case.dim for case in PLAN) >= 10**7
    for dtype in (F32, F16, BF16):
        assert sum(case.elements for case in PLAN if case.dtype == dtype) >= 2 * 10**6
    assert {case.bits for case in PLAN} == set(range(1, 9))


@pytest.mark.parametrize("case", PLAN, ids=lambda case: case.name)
def test_random_codes_are_identical(case: Random, device: torch.device) -> None:
    n = case.elements // case.dim
    shape = (2, 2, n // 4) if case.statistic == "per_head" else (n,)
    spec = QuantSpec(case.dim, case.bits, seed=case.dim + case.bits, **case.spec)  # type: ignore[arg-type]
    shift, equalizer = statistics_of(case.statistic, shape[:-1], case.dim)
    # magnitudes differ from vector to vector; a few coordinates are loud
    x = gaussian(*shape, case.dim, seed=case.bits) * np.exp(2 * gaussian(*shape, 1, seed=1))
    x[..., :: case.dim // 4] *= 8
    tensor = torch.from_numpy(np.clip(x, -3e4, 3e4)).to(case.dtype)
    arrays = {"shift": shift, "equalizer": equalizer}
    expected = encode(to_numpy(tensor), spec, shift, equalizer)
    packed, scales = quantize(
        tensor.to(device),
        spec,
        **{k: None if v is None else torch.from_numpy(v).to(device) for k, v in arrays.items()},
    )
    assert_same_bits(packed, scales, expected)


def _adversarial(dim: int) -> np.ndarray:
    """Return float32 vectors (n, dim) made to break ties, rounding or range."""
    generator = np.random.RandomState(dim)
    signs = generator.choice([-1.0, 1.0], (64, dim))
    one_hot = np.concatenate([np.eye(dim), -np.eye(dim), 1e-3 * np.eye(dim)])[: 3 * min(dim, 64)]
    two_hot = np.eye(dim) + np.roll(np.eye(dim), 1, axis=1)  # rotated: many exact zeros
    small_integers = generator.randint(-2, 3, (256, dim))  # rotated: integers, many zeros
    mixed = generator.standard_normal((64, dim)) * 10.0 ** generator.uniform(-6, 4, (64, dim))
    huge = generator.standard_normal((8, dim))
    huge[np.arange(8), np.arange(8) % dim] = 1e30 * (-1.0) ** np.arange(8)
    denormal = generator.randint(-3, 4, (32, dim)) * 2.0**-149
    half_denormal = generator.randint(-3, 4, (32, dim)) * 2.0**-24
    negative_zero = np.zeros((4, dim))
    negative_zero[1:] = -0.0
    negative_zero[2, :: max(2, dim // 8)] = 1.0
    negative_zero[3, 0] = -(2.0**-126)
    extremes = np.array([[3.4e38], [-3.4e38], [2.0**-126], [2.0**127], [2.0**-149], [1.0]])
    parts = [signs, one_hot, two_hot[:64], small_integers, mixed, huge, denormal, half_denormal]
    parts += [negative_zero, extremes * np.ones(dim), np.arange(dim)[None] - dim / 2]
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("estimator", ["mse", "prod"])
@pytest.mark.parametrize("rule", ["unbiased", "norm", "mse"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [2, 12, 64, 80, 96, 128, 1536])
def test_adversarial_codes_are_identical(
    dim: int, bits: int, rule: str, estimator: str, device: torch.device
) -> None:
    x = _adversarial(dim)
    spec = QuantSpec(
        dim,
        bits,
        scale_rule=rule,  # type: ignore[arg-type]
        estimator=estimator,  # type: ignore[arg-type]
        scale_dtype="float32",
    )
    assert_same_bits(
        *op.quantize(torch.from_numpy(x).to(device), None, None, spec.key), encode(x, spec)
    )


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("dim", [1, 64, 96])
def test_adversarial_half_precision(
    dim: int, bits: int, dtype: torch.dtype, device: torch.device
) -> None:
    """The same with fp16 scales, which may be denormal or zero."""
    tensor = torch.from_numpy(_adversarial(dim)).to(dtype)
    tensor = tensor[(tensor.abs() < 6e4).all(-1)]
    spec = QuantSpec(dim, bits)
    assert_same_bits(*quantize(tensor.to(device), spec), encode(to_numpy(tensor), spec))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_exact_ties_take_the_lower_code(bits: int, device: torch.device) -> None:
    """Zero lies on the middle boundary; a code is the number of boundaries strictly below."""
    x = torch.zeros(2, 64, device=device)
    x[1, :2] = 1.0  # H of e0 + e1 is 2 or 0 times a sign, whatever the signs: half are zeros
    spec = QuantSpec(64, bits)
    codes = unpack(to_numpy(quantize(x, spec)[0]), 64, bits)
    assert (codes[0] == 2 ** (bits - 1) - 1).all()
    assert (codes[1] == 2 ** (bits - 1) - 1).sum() >= 32


@pytest.mark.parametrize("spec", list(golden_specs()), ids=lambda spec: spec.key)
def test_golden_input(spec: QuantSpec, device: torch.device) -> None:
    x = golden_input(spec.dim)
    assert_same_bits(*quantize(torch.from_numpy(x).to(device), spec), encode(x, spec))


@pytest.mark.parametrize("dtype", [torch.float64, F32, F16, BF16])
def test_dtypes_are_rounded_to_float32(dtype: torch.dtype, device: torch.device) -> None:
    spec = QuantSpec(64, 4)
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((99, 64))).to(dtype)
    expected = encode(to_numpy(x), spec)
    assert_same_bits(*quantize(x.to(device), spec), expected)
    np.testing.assert_array_equal(expected.packed, reference(to_numpy(x), spec).packed)


@pytest.mark.parametrize("n", [0, 1, 63, 100, 127, 9001])
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_numbers_of_vectors(n: int, statistic: Statistic, device: torch.device) -> None:
    store = make_store(QuantSpec(96, 3), 2, n, statistic=statistic, device=device)
    x = gaussian(2, n, 96)
    if not n:
        packed, scales = quantize(torch.from_numpy(x).to(device), store.spec, **store.statistics)
        assert (tuple(packed.shape), packed.dtype) == ((2, 0, row_bytes(96, 3)), torch.uint8)
        assert (tuple(scales.shape), scales.dtype) == ((2, 0, 1), torch.float16)
        return
    got = quantize(torch.from_numpy(x).to(device), store.spec, **store.statistics)
    expected = encode(x, store.spec, store.shift_array, store.equalizer_array)
    assert_same_bits(*got, expected)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (3, 2), (2, 0, 3), (2, 1, 2, 5)])
def test_leading_axes(lead: tuple[int, ...], device: torch.device) -> None:
    spec = QuantSpec(64, 4, estimator="prod")
    x = gaussian(*lead, 64)
    assert_same_bits(*quantize(torch.from_numpy(x).to(device), spec), encode(x, spec))


@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_layouts(layout: str, statistic: Statistic, device: torch.device) -> None:
    """Strided views surrounded by NaN, with outputs that start as NaN."""
    spec = QuantSpec(64, 5, estimator="prod")
    x = gaussian(2, 3, 50, 64)
    shift, equalizer = statistics_of(statistic, (2, 3), 64)
    view = LAYOUTS[layout](torch.from_numpy(x).to(device))
    tensors = [None if s is None else torch.from_numpy(s).to(device) for s in (shift, equalizer)]
    got = quantize(view, spec, shift=tensors[0], equalizer=tensors[1])
    assert_same_bits(*got, encode(x, spec, shift, equalizer))


@pytest.mark.parametrize("dim", [1, 63, 100, 127])
@pytest.mark.parametrize("bits", range(1, 9))
def test_odd_dims(bits: int, dim: int, device: torch.device) -> None:
    """A QR rotation is a matmul: codes beside a boundary may differ by one, and only those."""
    spec = spec_of(dim, bits)
    x = gaussian(200, dim, seed=bits)
    packed, scales = (to_numpy(t) for t in quantize(torch.from_numpy(x).to(device), spec))
    codes = unpack(packed, dim, bits)
    np.testing.assert_array_equal(packed, pack(codes, bits))  # and nothing but zeros between
    expected = encode(x, spec)
    difference = codes.astype(int) - unpack(expected.packed, dim, bits)
    assert np.abs(difference).max() <= 1
    # u has an error of a few 1e-7 and a boundary a density of at most 2^bits / 2
    assert (difference != 0).mean() <= 1e-6 * 2**bits
    same = (difference == 0).all(-1)
    np.testing.assert_allclose(scales[same], expected.scales[same], rtol=2**-10)


def test_codes_do_not_depend_on_threads() -> None:
    spec = QuantSpec(64, 4, estimator="prod")
    x = gaussian(3000, 64)  # several times the least work torch gives a thread
    with threads(3):
        got = quantize(torch.from_numpy(x), spec)
    assert_same_bits(*got, encode(x, spec))


def test_does_not_write_its_input(device: torch.device) -> None:
    x = torch.from_numpy(gaussian(10, 128)).to(device)
    shift = torch.ones(128, device=device)
    before = x.clone()
    quantize(x, QuantSpec(128, 4, estimator="prod"), shift=shift, equalizer=shift)
    assert torch.equal(x, before)
    assert torch.equal(shift, torch.ones_like(shift))


@pytest.mark.parametrize("estimator", ["mse", "prod"])
@pytest.mark.parametrize("rule", ["unbiased", "norm", "mse"])
def test_zero_vectors(rule: str, estimator: str, device: torch.device) -> None:
    spec = QuantSpec(96, 3, scale_rule=rule, estimator=estimator)  # type: ignore[arg-type]
    x = torch.from_numpy(gaussian(3, 96)).to(device)
    x[1] = 0
    decoded = dequantize(*quantize(x, spec), spec)
    assert (decoded[1] == 0).all()
    shift = torch.from_numpy(gaussian(96, seed=1)).to(device)
    packed, scales = quantize(shift.expand(2, 96), spec, shift=shift)
    assert torch.equal(dequantize(packed, scales, spec, shift=shift), shift.expand(2, 96))


@pytest.mark.parametrize("estimator", ["mse", "prod"])
@pytest.mark.parametrize("rule", ["unbiased", "norm", "mse"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("lead", "index", "text"),
    [((), (), "vector"), ((5,), (3,), "vector 3 "), ((2, 3, 4), (1, 0, 2), r"vector \(1, 0, 2\) ")],
)
def test_first_bad_vector_is_named(
    lead: tuple[int, ...],
    index: tuple[int, ...],
    text: str,
    bad: float,
    rule: str,
    estimator: str,
    device: torch.device,
) -> None:
    spec = QuantSpec(64, 4, scale_rule=rule, estimator=estimator)  # type: ignore[arg-type]
    x = torch.from_numpy(gaussian(*lead, 64)).to(device)
    x[(*index, 17)] = bad
    if lead:
        x[(*[n - 1 for n in lead], 0)] = bad  # a later one is not the first
    with pytest.raises(InputError, match=rf"finite.*{text}.*NaN or infinity.*nan_to_num"):
        quantize(x, spec)


@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_overflow_of_the_scale(estimator: str, device: torch.device) -> None:
    x = torch.from_numpy(gaussian(4, 64)).to(device)
    x[2] *= 1e8
    with pytest.raises(InputError, match=r'vector 2 has norm .*e\+0.*float16.*"float32"'):
        quantize(x, QuantSpec(64, 4, estimator=estimator))  # type: ignore[arg-type]
    spec = QuantSpec(64, 8, estimator=estimator, scale_dtype="float32")  # type: ignore[arg-type]
    decoded = dequantize(*quantize(x, spec), spec)
    assert float((decoded[2] - x[2]).norm() / x[2].norm()) < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(3, 63)}, r"64.*got shape \(3, 63\)"),
        ({"x": torch.ones(())}, r"64.*got shape \(\)"),
        ({"x": torch.ones(3, 64, dtype=torch.int64)}, r"floating.*got torch.int64"),
        ({"x": [1.0] * 64}, r"torch.Tensor.*got list"),
        ({"shift": torch.ones(63)}, r"shift.*\(64,\).*got \(63,\)"),
        ({"shift": torch.ones(())}, r"shift.*\(64,\).*got \(\)"),
        ({"shift": torch.ones(1)}, r"shift.*\(64,\).*got \(1,\)"),
        ({"shift": torch.ones(3, 64)}, r"shift.*1, 64.*got \(3, 64\)"),
        ({"shift": torch.ones(2, 1, 64)}, r"shift.*\(3, 64\).*got \(2, 1, 64\)"),
        ({"equalizer": torch.ones(64, dtype=torch.int32)}, r"equalizer.*floating.*got torch.int32"),
        ({"equalizer": torch.ones(2, 64)}, r"equalizer.*1, 64.*got \(2, 64\)"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(**{"x": torch.ones(3, 64), "spec": QuantSpec(64), **arguments})


@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_opcheck(estimator: str, statistic: Statistic, device: torch.device) -> None:
    spec = QuantSpec(96, 3, estimator=estimator)  # type: ignore[arg-type]
    shift, equalizer = statistics_of(statistic, (2,), 96)
    tensors = [None if s is None else torch.from_numpy(s).to(device) for s in (shift, equalizer)]
    x = torch.from_numpy(gaussian(2, 7, 96)).to(device)
    torch.library.opcheck(op.quantize, (x, *tensors, spec.key))


CUDA = torch.device("cuda")


def _on_gpu(case: Random, n: int, seed: int) -> tuple[torch.Tensor, dict, QuantSpec]:
    """Return vectors made on the GPU, with loud channels and magnitudes that differ, for a case."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    shape = (2, 2, n // 4) if case.statistic == "per_head" else (n,)
    x = torch.randn((*shape, case.dim), generator=generator, device=CUDA)
    x *= torch.exp(2 * torch.randn((*shape, 1), generator=generator, device=CUDA))
    x[..., :: case.dim // 4] *= 8
    arrays = zip(
        ("shift", "equalizer"), statistics_of(case.statistic, shape[:-1], case.dim), strict=True
    )
    statistics = {k: None if v is None else torch.from_numpy(v).to(CUDA) for k, v in arrays}
    spec = QuantSpec(case.dim, case.bits, seed=seed, **case.spec)  # type: ignore[arg-type]
    # the least equalizer is about 0.04, and a float16 scale has to hold the quotient
    limit = 3e4 if case.statistic == "none" else 3e3
    return x.clamp_(-limit, limit).to(case.dtype), statistics, spec


HAS_KERNEL = [c for c in PLAN if "estimator" not in c.spec or c.dim & (c.dim - 1) == 0]


@pytest.mark.gpu
@pytest.mark.parametrize("case", HAS_KERNEL, ids=lambda case: case.name)
def test_kernel_runs_the_plan(case: Random) -> None:
    """On a GPU "auto" means the kernel for all of these: an explicit choice never falls back."""
    x, statistics, spec = _on_gpu(case, 4096, seed=case.dim + case.bits)
    packed, scales = quantize(x, spec, **statistics, impl="triton")
    expected = quantize(x, spec, **statistics, impl="eager")
    assert torch.equal(packed, expected[0])
    assert torch.equal(scales, expected[1])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", HAS_KERNEL, ids=lambda case: case.name)
def test_hundred_million_codes_are_identical(case: Random) -> None:
    """Kernel against eager torch, itself compared with the definition above; 1.7e8 numbers."""
    for seed in range(2):
        x, statistics, spec = _on_gpu(case, 2**22 // case.dim, seed)
        packed, scales = quantize(x, spec, **statistics, impl="triton")
        expected = quantize(x, spec, **statistics, impl="eager")
        rows = (packed != expected[0]).any(-1) | (scales != expected[1]).any(-1)
        assert not bool(rows.any()), f"{int(rows.sum())} of {rows.numel()} vectors differ"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("dim", "rows"), [(128, 2**24 + 77), (96, 2**25 - 9)])
def test_more_than_two_to_the_31_bytes_of_codes(dim: int, rows: int) -> None:
    spec = QuantSpec(dim, 8)
    x = torch.randn(rows, dim, device=CUDA, dtype=BF16)
    packed, scales = quantize(x, spec, impl="triton")
    assert packed.numel() > 2**31
    middle = 2**31 // dim
    for part in (slice(0, 300), slice(middle - 150, middle + 150), slice(rows - 300, rows)):
        expected = quantize(x[part], spec, impl="eager")
        assert torch.equal(packed[part], expected[0])
        assert torch.equal(scales[part], expected[1])
