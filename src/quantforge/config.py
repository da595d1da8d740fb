"""What a user chooses: `QuantForgeConfig`, turned into a `QuantSpec` for each dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, get_args

from quantforge import settings
from quantforge.errors import ConfigError
from quantforge.spec import (
    Estimator,
    QuantSpec,
    Rotation,
    ScaleDtype,
    ScaleRule,
    check_choice,
    codebook_text,
    hadamard_base,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class QuantForgeConfig:
    """How to quantize, for vectors of any dim.

    Args:
        bits: bits per number, 1-8.
        rotation: "auto" (Hadamard where the dim has one, else QR), "hadamard", "qr" or "none".
        codebook: "lloyd_max", "gaussian" or "e4m3", or 2^bits centroids of your own; see
            `QuantSpec`.
        scale_rule: "unbiased" (inner products, search), "norm" or "mse" (reconstruction).
        estimator: "mse", or "prod" for the QJL residual. At equal bits its error is larger; it
            is there to reproduce arXiv 2504.19874, Algorithm 2.
        shift: subtract the mean of the data first (one more pass over it).
        equalizer: divide each channel by the square root of its RMS first (likewise).
        seed: seed of the rotation.
        scale_dtype: "float16", or "float32" for vectors beyond the range of fp16.

    Raises:
        ConfigError: for a value outside these choices.
    """

    bits: int = 4
    rotation: Literal["auto"] | Rotation = "auto"
    codebook: str | Sequence[float] | NDArray = "lloyd_max"
    scale_rule: ScaleRule = "unbiased"
    estimator: Estimator = "mse"
    shift: bool = False
    equalizer: bool = False
    seed: int = 0
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        check_choice("rotation", self.rotation, ("auto", *get_args(Rotation)))
        for name in ("shift", "equalizer"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} must be True or False; got {getattr(self, name)!r}")
        spec = self.spec(64)  # checks the other fields; dim 64 has every rotation
        object.__setattr__(self, "codebook", spec.codebook)

    def spec(self, dim: int) -> QuantSpec:
        """Return the spec for vectors of `dim` numbers.

        Raises:
            ConfigError: if `rotation="hadamard"` and the dim has no Hadamard matrix.
        """
        rotation = self.rotation
        if rotation == "auto":
            rotation = "qr" if hadamard_base(dim) is None else "hadamard"
        return QuantSpec(
            dim=dim,
            bits=self.bits,
            rotation=rotation,
            seed=self.seed,
            codebook=codebook_text(self.codebook),
            scale_rule=self.scale_rule,
            estimator=self.estimator,
            scale_dtype=self.scale_dtype,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantForgeConfig:
        """Build a config from plain values.

        Raises:
            ConfigError: for an unknown name or a bad value.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown settings {unknown}; known are {sorted(known)}")
        return cls(**values)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the settings into a JSON file for `from_file`."""
        settings.write(path, {"vectors": self.to_dict()})

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> QuantForgeConfig:
        """Read the section "vectors" of a file of settings (`settings`, `quantforge optimize`).

        Raises:
            FormatError: for a file of another kind or of a later version.
            ConfigError: for a bad setting, with its name.
        """
        return settings.read(path, "vectors", cls.from_dict)
