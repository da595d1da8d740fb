"""The frozen description of a code: everything but the data that decoding needs.

A `QuantSpec` is hashable, travels as a short string through operator schemas, tensor
metadata and file headers, and fixes the bytes: the same spec and input give the same codes
on every backend.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

from quantforge.errors import ConfigError, FormatError

Rotation = Literal["hadamard", "qr"]
CodebookName = Literal["lloyd_max", "gaussian", "e4m3"]
ScaleRule = Literal["unbiased", "norm", "mse"]
Estimator = Literal["mse", "prod"]
ScaleDtype = Literal["float16", "float32"]

MAX_BITS = 8
E4M3_MAX_BITS = 5
"""Beyond 5 bits fp8 has too few values per octave to hold the codebook."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "rotation": get_args(Rotation),
    "codebook": get_args(CodebookName),
    "scale_rule": get_args(ScaleRule),
    "estimator": get_args(Estimator),
    "scale_dtype": get_args(ScaleDtype),
}
_HADAMARD_BASES = (28, 20, 12, 1)


def hadamard_base(dim: int) -> int | None:
    """Return m in {1, 12, 20, 28} with `dim == m * 2**k`, or None where there is none."""
    for base in _HADAMARD_BASES:
        power, rest = divmod(dim, base)
        if rest == 0 and power > 0 and power & (power - 1) == 0:
            return base
    return None


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise `ConfigError` unless `value` is an int in [low, high]."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}; got {value!r}")


@dataclass(frozen=True)
class QuantSpec:
    """How vectors of one dimension are coded.

    Args:
        dim: vector length.
        bits: bits per coordinate, 1-8; with `estimator="prod"` one of them is the QJL sign.
        rotation: "hadamard" (randomized, exact on every backend) or "qr" (Haar; a matmul,
            so its codes may differ between backends in the last bit).
        seed: seed of the rotation.
        codebook: "lloyd_max" (Beta marginal of a rotated unit vector), "gaussian" (its limit)
            or "e4m3" (Lloyd-Max snapped to fp8 values, 1-5 bits).
        scale_rule: what the stored scale preserves: "unbiased" inner products, the vector's
            "norm", or least squared error ("mse").
        estimator: "mse", or "prod" for the QJL residual (arXiv 2504.19874, Algorithm 2).
        scale_dtype: "float16", or "float32" for vectors beyond the range of fp16.

    Raises:
        ConfigError: for a value outside these choices.
    """

    dim: int
    bits: int = 4
    rotation: Rotation = "hadamard"
    seed: int = 0
    codebook: CodebookName = "lloyd_max"
    scale_rule: ScaleRule = "unbiased"
    estimator: Estimator = "mse"
    scale_dtype: ScaleDtype = "float16"
    _key: ClassVar[str]

    def __post_init__(self) -> None:
        check_int("dim", self.dim, 1, 1 << 20)
        check_int("bits", self.bits, 1, MAX_BITS)
        check_int("seed", self.seed, 0, 2**32 - 1)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.rotation == "hadamard" and hadamard_base(self.dim) is None:
            raise ConfigError(
                f"there is no Hadamard rotation of dim {self.dim}: it needs 2^k times 1, 12, 20 "
                'or 28; use rotation="qr" (or "auto" in QuantForgeConfig)'
            )
        if self.codebook == "e4m3" and self.bits > E4M3_MAX_BITS:
            raise ConfigError(
                f"the e4m3 codebook has 1-{E4M3_MAX_BITS} bits; got bits={self.bits}; "
                'use codebook="lloyd_max"'
            )
        if self.estimator == "prod" and self.bits < 2:
            raise ConfigError('estimator="prod" needs bits >= 2: one of them is the QJL sign')
        key = ";".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        object.__setattr__(self, "_key", key)

    @property
    def code_bits(self) -> int:
        """Bits of the codebook index (one less than `bits` with the QJL residual)."""
        return self.bits - (self.estimator == "prod")

    @property
    def scales_per_vector(self) -> int:
        """Scales stored with each vector: one, and one more for the QJL residual."""
        return 2 if self.estimator == "prod" else 1

    @property
    def key(self) -> str:
        """Canonical string; `QuantSpec.from_key` inverts it."""
        return self._key

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_key(key: str) -> QuantSpec:
        """Parse a canonical string.

        Raises:
            FormatError: if a field is missing, unknown or malformed.
        """
        values: dict[str, Any] = {}
        for item in key.split(";"):
            name, _, text = item.partition("=")
            values[name] = int(text) if text.isascii() and text.isdigit() else text
        expected = [f.name for f in dataclasses.fields(QuantSpec)]
        if list(values) != expected:
            raise FormatError(f"a spec string has the fields {expected}; got {key!r}")
        return QuantSpec(**values)
