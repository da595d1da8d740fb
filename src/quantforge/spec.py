"""The frozen description of a code: everything but the data that decoding needs.

A `QuantSpec` is hashable, travels as a short string through operator schemas, tensor
metadata and file headers, and fixes the bytes: the same spec and input give the same codes
on every backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from quantforge.errors import ConfigError, FormatError

if TYPE_CHECKING:  # the command line reads settings without numpy
    import numpy as np
    from numpy.typing import NDArray

Rotation = Literal["hadamard", "qr", "none"]
CodebookName = Literal["lloyd_max", "gaussian", "e4m3"]
ScaleRule = Literal["unbiased", "norm", "mse"]
Estimator = Literal["mse", "prod"]
ScaleDtype = Literal["float16", "float32"]

MAX_BITS = 8
E4M3_MAX_BITS = 5
"""Beyond 5 bits fp8 has too few values per octave to hold the codebook."""

CENTROIDS = "centroids:"
"""What the text of a codebook of one's own begins with."""

_LARGEST = (2.0**-4, 2.0**10)
_LEAST_GAP = 2.0**-14
"""Of centroids as a share of the largest: tables of uniform cells stay small."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "rotation": get_args(Rotation),
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


def codebook_text(codebook: str | Sequence[float] | NDArray) -> str:
    """Return a codebook as a spec holds it: a name, or "centroids:" and float32 numbers.

    Raises:
        ConfigError: for what is neither text nor numbers.
    """
    if isinstance(codebook, str):
        return codebook
    import numpy as np

    try:
        centroids = np.asarray(codebook, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"a codebook is a name or numbers: {error}") from error
    if centroids.ndim != 1:
        raise ConfigError(f"centroids are a sequence of numbers; got shape {centroids.shape}")
    return CENTROIDS + ",".join(map(str, centroids))


def own_centroids(codebook: str) -> NDArray[np.float32] | None:
    """Return the centroids that a codebook's text lists, None for a name."""
    if not codebook.startswith(CENTROIDS):
        return None
    import numpy as np

    return np.array(codebook.removeprefix(CENTROIDS).split(","), np.float32)


def _check_codebook(codebook: object, bits: int) -> str:
    """Return the canonical text of a codebook; `ConfigError` if it cannot be one."""
    if not isinstance(codebook, str) or not codebook.startswith(CENTROIDS):
        names = get_args(CodebookName)
        if not isinstance(codebook, str) or codebook not in names:
            raise ConfigError(
                f"codebook must be one of {', '.join(names)}, or 2^bits centroids; got {codebook!r}"
            )
        return codebook
    count = codebook.count(",") + 1
    if count != 1 << bits:
        raise ConfigError(f"a codebook of {bits} bits has {1 << bits} centroids; got {count}")
    try:
        centroids = own_centroids(codebook)
    except ValueError as error:
        raise ConfigError(f"the centroids of a codebook are numbers: {error}") from error
    assert centroids is not None
    largest = float(abs(centroids).max())
    if not _LARGEST[0] <= largest <= _LARGEST[1]:  # nor NaN
        raise ConfigError(
            f"the largest centroid must be from {_LARGEST[0]} to {_LARGEST[1]:.0f} in size; got "
            f"{largest}; their unit is that of coordinates with mean square 1"
        )
    exact = centroids.astype("float64")
    if not (exact[1:] - exact[:-1]).min() >= _LEAST_GAP * largest:
        raise ConfigError(
            "centroids must ascend, each by 2^-14 of the largest at least; sort them, and list "
            "none twice"
        )
    return codebook_text(centroids)


@dataclass(frozen=True)
class QuantSpec:
    """How vectors of one dimension are coded.

    Args:
        dim: vector length.
        bits: bits per coordinate, 1-8; with `estimator="prod"` one of them is the QJL sign.
        rotation: "hadamard" (randomized, exact on every backend), "qr" (Haar; a matmul,
            so its codes may differ between backends in the last bit) or "none", for vectors
            whose coordinates have a known distribution of their own.
        seed: seed of the rotation.
        codebook: "lloyd_max" (Beta marginal of a rotated unit vector), "gaussian" (its limit),
            "e4m3" (Lloyd-Max snapped to fp8 values, 1-5 bits), or centroids of your own as
            `codebook_text` writes them: 2^bits numbers that ascend, in units of coordinates
            with mean square 1. Boundaries are halfway between them.
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
    codebook: str = "lloyd_max"
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
        object.__setattr__(self, "codebook", _check_codebook(self.codebook, self.code_bits))
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
        if self.estimator == "prod" and self.rotation == "none":
            raise ConfigError('estimator="prod" needs a rotation: its signs are of random ones')
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
