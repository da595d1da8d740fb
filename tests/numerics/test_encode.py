"""The definition of a code against theory (arXiv 2504.19874) and against committed bytes.

Run as a script, `python -m tests.numerics.test_encode` rewrites the golden bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import pi, sqrt
from pathlib import Path

import numpy as np
import pytest

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.encode import decode, encode, floor_power_of_two, power_of, tree_sum
from quantforge.numerics.lloyd_max import distortion, solve
from quantforge.numerics.packing import row_bytes, unpack
from quantforge.numerics.rotation import rotation_matrix
from quantforge.spec import QuantSpec
from tests.helpers import gaussian, spec_of, sphere

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "codes_v1.json"
BITS = range(1, 9)
RULES = ("unbiased", "norm", "mse")
TABLE = {1: 0.3634, 2: 0.11748, 3: 0.03455, 4: 0.00950}


# --- golden bytes ---------------------------------------------------------------------------


def golden_specs() -> Iterator[QuantSpec]:
    for dim in (20, 64, 96):
        for bits in BITS:
            yield QuantSpec(dim, bits)
            if bits >= 2:
                yield QuantSpec(dim, bits, estimator="prod", seed=3)
            if bits <= 5:
                yield QuantSpec(dim, bits, codebook="e4m3", scale_rule="mse")
        yield QuantSpec(dim, 4, codebook="gaussian", scale_rule="norm", scale_dtype="float32")


def golden_input(dim: int) -> np.ndarray:
    """Return two vectors of multiples of 2^-12, exact in float32, without a random generator."""
    i = np.arange(2 * dim, dtype=np.int64)
    return (((i * 2654435761) % 2**16 - 32768) / 4096).astype(np.float32).reshape(2, dim)


def golden_codes(spec: QuantSpec) -> dict[str, str]:
    encoded = encode(golden_input(spec.dim), spec)
    return {
        "packed": encoded.packed.tobytes().hex(),
        "scales": encoded.scales.astype(encoded.scales.dtype.newbyteorder("<")).tobytes().hex(),
    }


def write_golden() -> None:
    golden = {spec.key: golden_codes(spec) for spec in golden_specs()}
    GOLDEN_FILE.parent.mkdir(exist_ok=True)
    GOLDEN_FILE.write_text(json.dumps(golden, indent=0) + "\n")


def test_golden_file_is_complete() -> None:
    assert list(json.loads(GOLDEN_FILE.read_text())) == [spec.key for spec in golden_specs()]


@pytest.mark.parametrize("spec", list(golden_specs()), ids=lambda spec: spec.key)
def test_golden_codes(spec: QuantSpec) -> None:
    """Files of version 1 hold these bytes: changing them is a format change.

    Bump the version, keep this file and add a new one, and write a line in CHANGELOG.
    """
    assert golden_codes(spec) == json.loads(GOLDEN_FILE.read_text())[spec.key]


# --- steps ----------------------------------------------------------------------------------


def test_tree_sum_order() -> None:
    """1e8 swallows a 1 that meets it alone: the order shows in the result."""
    big, one = np.float32(1e8), np.float32(1)
    # n = 4: (x0 + x2) + (x1 + x3)
    assert tree_sum(np.array([big, one, -big, one])) == 2
    assert tree_sum(np.array([big, -big, one, one])) == 0
    # n = 5: x0 + x4 first, as if padded to 8
    assert tree_sum(np.array([big, one, 0, one, -big], np.float32)) == 2
    assert tree_sum(np.array([big, one, -big, one, 0], np.float32)) == 2


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 100, 127])
def test_tree_sum_is_a_sum(n: int) -> None:
    x = np.random.RandomState(n).randint(-1000, 1000, (5, n))
    np.testing.assert_array_equal(tree_sum(x.astype(np.float32)), x.sum(-1))


def test_floor_power_of_two() -> None:
    x = np.array([0, 1e-45, 2.0**-126, 0.75, 1, 1.9999999, 3, 2.0**127, 3.4e38], np.float32)
    tiny = 2.0**-126
    expected = [tiny, tiny, tiny, 0.5, 1, 1, 2, 2.0**127, 2.0**127]
    np.testing.assert_array_equal(floor_power_of_two(x), np.array(expected, np.float32))


def test_ordinary_vectors_are_not_scaled() -> None:
    below = np.nextafter(np.float32(2.0**-32), np.float32(0))
    x = np.array([0, below, 2.0**-32, 0.75, 3, 1.5 * 2.0**31, 2.0**32, 3.4e38], np.float32)
    expected = [2.0**-126, 2.0**-33, 1, 1, 1, 1, 2.0**32, 2.0**127]
    np.testing.assert_array_equal(power_of(x), np.array(expected, np.float32))


# --- rate and distortion --------------------------------------------------------------------


def _centroids_of(x: np.ndarray, spec: QuantSpec) -> np.ndarray:
    encoded = encode(x, spec)
    return codebook_of(spec).centroids.astype(np.float64)[
        unpack(encoded.packed, spec.dim, spec.code_bits)
    ]


@pytest.mark.parametrize("dim", [64, 128, 384, 768, 1536])
@pytest.mark.parametrize("bits", BITS)
def test_rate_distortion(bits: int, dim: int) -> None:
    """Measured ||u - c||^2 / d of real codes is the integral over the Beta marginal."""
    spec = QuantSpec(dim, bits, seed=bits)
    x = sphere((1 << 18) // dim, dim, seed=1000 * bits + dim)
    u = x @ rotation_matrix(spec).T * sqrt(dim)
    error = np.square(u - _centroids_of(x, spec)).mean(-1)
    standard_error = error.std(ddof=1) / sqrt(len(error))
    expected = distortion(solve(bits, dim), dim)
    assert abs(error.mean() - expected) <= 4 * standard_error
    if bits in TABLE:
        assert error.mean() <= 1.03 * TABLE[bits]
        if dim > 64:  # at dim 64 the Beta marginal has lighter tails: 4% less error at 4 bits
            assert error.mean() >= 0.97 * TABLE[bits]


@pytest.mark.parametrize("rotation", ["hadamard", "qr"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", BITS)
def test_theorems_1_and_3(bits: int, rule: str, rotation: str) -> None:
    """4^-b <= E||x - x_hat||^2 <= sqrt(3) pi / 2 * 4^-b for unit vectors."""
    spec = QuantSpec(128, bits, rotation=rotation, scale_rule=rule)  # type: ignore[arg-type]
    x = sphere(1000, 128, seed=bits)
    error = np.square(decode(encode(x, spec), spec) - x).sum(-1)
    assert 4.0**-bits <= error.mean() <= sqrt(3) * pi / 2 * 4.0**-bits


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_theorem_1_holds_for_every_vector_over_rotations(bits: int) -> None:
    """The worst vectors of an unrotated quantizer are no worse than others after a Haar one."""
    vectors = np.zeros((3, 64))
    vectors[0, 0] = 1
    vectors[1, :2] = sqrt(0.5)
    vectors[2] = 1 / 8
    errors = []
    for seed in range(60):
        spec = QuantSpec(64, bits, rotation="qr", seed=seed, scale_rule="mse")
        errors.append(np.square(decode(encode(vectors, spec), spec) - vectors).sum(-1))
    assert (np.mean(errors, axis=0) <= sqrt(3) * pi / 2 * 4.0**-bits).all()


@pytest.mark.parametrize("codebook", ["lloyd_max", "gaussian", "e4m3"])
def test_codebooks_are_interchangeable(codebook: str) -> None:
    """Whatever its unit, a codebook at 4 bits has the distortion of the table when decoded."""
    spec = QuantSpec(256, 4, codebook=codebook, scale_rule="mse")  # type: ignore[arg-type]
    x = sphere(1000, 256)
    error = np.square(decode(encode(x, spec), spec) - x).sum(-1).mean()
    assert error == pytest.approx(TABLE[4], rel=0.03)


# --- scale rules ----------------------------------------------------------------------------


def _roundoff(spec: QuantSpec) -> float:
    """Relative error of a stored scale: its rounding, and the float32 sums before it."""
    return float(np.finfo(spec.scale_dtype).eps) / 2 + 4 * float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("dim", [1, 63, 64, 96, 127])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_scale_rules(bits: int, dim: int, scale_dtype: str) -> None:
    x = gaussian(50, dim, seed=dim).astype(np.float64)
    norm_x = np.linalg.norm(x, axis=-1)
    decoded = {}
    for rule in RULES:
        spec = spec_of(dim, bits, scale_rule=rule, scale_dtype=scale_dtype)
        decoded[rule] = decode(encode(x, spec), spec)
    tolerance = _roundoff(spec)

    inner = (decoded["unbiased"] * x).sum(-1)
    np.testing.assert_allclose(inner, norm_x**2, rtol=tolerance)
    np.testing.assert_allclose(np.linalg.norm(decoded["norm"], axis=-1), norm_x, rtol=tolerance)
    # least squares: the residual is orthogonal to the decoded vector
    projected = (decoded["mse"] * x).sum(-1) / np.square(decoded["mse"]).sum(-1)
    np.testing.assert_allclose(projected, 1, rtol=tolerance)


def test_scale_rules_share_codes() -> None:
    x = gaussian(50, 64)
    rows = [encode(x, QuantSpec(64, 3, scale_rule=rule)).packed for rule in RULES]  # type: ignore[arg-type]
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])


# --- the QJL residual -----------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["hadamard", "qr"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_theorem_2(bits: int, rule: str, rotation: str) -> None:
    """Inner products are unbiased, with variance <= sqrt(3) pi^2 / d * 4^-b * ||y||^2.

    Random signs before a Hadamard matrix are not Gaussian: coordinates in the tail are a little
    underestimated and a bias of order 1/d remains, an eighth of a standard deviation at most.
    """
    dim, seeds, pairs = 64, 300, 32
    x = sphere(pairs, dim, seed=1)
    y = 0.6 * x + 0.8 * sphere(pairs, dim, seed=2)  # correlated: a shrunken x would show
    y_norm2 = np.square(y).sum(-1)
    errors = np.empty((seeds, pairs))
    for seed in range(seeds):
        spec = QuantSpec(
            dim,
            bits,
            rotation=rotation,  # type: ignore[arg-type]
            scale_rule=rule,  # type: ignore[arg-type]
            estimator="prod",
            seed=seed,
        )
        errors[seed] = ((decode(encode(x, spec), spec) - x) * y).sum(-1)
    per_seed = errors.mean(-1)  # pairs of one seed share a rotation and are not independent
    bias = 0.2 / dim if rotation == "hadamard" else 0.0
    assert abs(per_seed.mean()) <= bias + 4 * per_seed.std(ddof=1) / sqrt(seeds)
    variance = np.square(errors).mean(0) / y_norm2
    assert variance.mean() <= sqrt(3) * pi**2 / dim * 4.0**-bits


def test_without_the_residual_mse_codes_are_biased() -> None:
    """The control of the test above: plain MSE codes shrink inner products by the distortion."""
    dim, bits = 64, 2
    x = sphere(2000, dim)
    spec = QuantSpec(dim, bits, scale_rule="mse")
    error = ((decode(encode(x, spec), spec) - x) * x).sum(-1)
    assert error.mean() == pytest.approx(-TABLE[bits], rel=0.1)


def test_prod_layout() -> None:
    """Codes of b - 1 bits as without the residual, then the plane of signs; two scales."""
    x = gaussian(20, 96)
    plain = encode(x, QuantSpec(96, 3))
    prod = encode(x, QuantSpec(96, 4, estimator="prod"))
    width = row_bytes(96, 3)
    np.testing.assert_array_equal(prod.packed[:, :width], plain.packed)
    assert prod.packed.shape[1] == width + row_bytes(96, 1)
    np.testing.assert_array_equal(prod.scales[:, :1], plain.scales)
    assert (prod.scales[:, 1] > 0).all()


# --- edges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["mse", "prod"])
@pytest.mark.parametrize("rule", RULES)
def test_zero_vectors_come_back_as_zero(rule: str, estimator: str) -> None:
    spec = QuantSpec(64, 3, scale_rule=rule, estimator=estimator)  # type: ignore[arg-type]
    x = gaussian(3, 64)
    x[1] = 0
    encoded = encode(x, spec)
    assert (encoded.scales[1] == 0).all()
    decoded = decode(encoded, spec)
    assert (decoded[1] == 0).all()
    assert (decoded[[0, 2]] != 0).any(-1).all()
    shift = gaussian(64, seed=5)
    shifted = encode(x + shift, spec, shift)
    np.testing.assert_array_equal(
        decode(encode(shift[None], spec, shift), spec, shift), shift[None].astype(np.float64)
    )
    assert np.isfinite(shifted.scales).all()


@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_codes_do_not_depend_on_powers_of_two(estimator: str) -> None:
    """Inputs of any magnitude keep all bits: the power of two is taken out first."""
    spec = QuantSpec(64, 4, estimator=estimator, scale_dtype="float32")  # type: ignore[arg-type]
    x = gaussian(10, 64)
    expected = encode(x, spec)
    for exponent in (-100, -40, -30, 30, 40, 100):
        scaled = encode(np.ldexp(x, exponent), spec)
        np.testing.assert_array_equal(scaled.packed, expected.packed)
        np.testing.assert_array_equal(scaled.scales, np.ldexp(expected.scales, exponent))


@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_a_scale_beyond_fp16_is_infinite_without_warning(estimator: str) -> None:
    spec = QuantSpec(64, 4, estimator=estimator)  # type: ignore[arg-type]
    encoded = encode(np.full((1, 64), 1e10, np.float32), spec)
    assert not np.isfinite(encoded.scales).all()


def test_decode_applies_shift_after_equalizer() -> None:
    x = gaussian(4, 64)
    spec = QuantSpec(64, 8)
    shift, equalizer = 10 * gaussian(64, seed=1), np.exp(gaussian(64, seed=2))
    encoded = encode(x * equalizer + shift, spec, shift, equalizer)
    decoded = decode(encoded, spec, shift, equalizer)
    np.testing.assert_allclose((decoded - shift) / equalizer, decode(encoded, spec), rtol=1e-10)
    plain = np.square(decode(encode(x, spec), spec) - x).mean()
    again = np.square((decoded - shift) / equalizer - x).mean()
    assert again == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3), (2, 0, 3)])
def test_leading_axes(lead: tuple[int, ...]) -> None:
    spec = QuantSpec(64, 3, estimator="prod")
    x = gaussian(*lead, 64)
    encoded = encode(x, spec)
    assert encoded.packed.shape == (*lead, 16 + 8)
    assert encoded.scales.shape == (*lead, 2)
    flat = encode(x.reshape(-1, 64), spec)
    np.testing.assert_array_equal(encoded.packed.reshape(-1, 24), flat.packed)


if __name__ == "__main__":
    write_golden()
