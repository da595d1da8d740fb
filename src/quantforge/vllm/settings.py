"""Settings of the cache in vLLM, as JSON carries them to its processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from quantforge.errors import ConfigError
from quantforge.numerics.packing import row_bytes
from quantforge.spec import (
    MAX_BITS,
    CodebookName,
    QuantSpec,
    Rotation,
    ScaleRule,
    check_choice,
    check_int,
    hadamard_base,
)

KEY = "quantforge"
"""Name of the settings in vLLM's `additional_config`."""

SCALE_BYTES = 2

BitsPair = tuple[int, int]


def pair_of(bits: Any) -> BitsPair:
    """Return bits of keys and of values, from one number or two.

    Raises:
        ConfigError: for anything else.
    """
    found = (bits, bits) if isinstance(bits, int) else bits
    if not isinstance(found, list | tuple) or len(found) != 2:
        raise ConfigError(f"bits must be a number or a pair, of keys and values; got {bits!r}")
    for name, each in zip(("bits of keys", "bits of values"), found, strict=True):
        check_int(name, each, 1, MAX_BITS)
    return found[0], found[1]


@dataclass(frozen=True)
class Settings:
    """How a model's keys and values are stored.

    Args:
        bits: bits per number, 1-8; or a pair for keys and values.
        layers: {layer: bits} of those that differ.
        statistics: safetensors file of shifts and equalizers (`measure_statistics`), or None.
        key_scale_rule: what the scale of a key preserves.
        value_scale_rule: what the scale of a value preserves.
        codebook: see `QuantSpec`.
        seed: of the rotation; the same on all ranks.

    Raises:
        ConfigError: for a value out of range.
    """

    bits: BitsPair = (4, 4)
    layers: Mapping[int, BitsPair] = field(default_factory=dict, hash=False)
    statistics: str | None = None
    key_scale_rule: ScaleRule = "norm"
    value_scale_rule: ScaleRule = "unbiased"
    codebook: CodebookName = "lloyd_max"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", pair_of(self.bits))
        layers = {_layer(index): pair_of(bits) for index, bits in dict(self.layers).items()}
        object.__setattr__(self, "layers", layers)
        check_choice("key_scale_rule", self.key_scale_rule, get_args(ScaleRule))
        check_choice("value_scale_rule", self.value_scale_rule, get_args(ScaleRule))
        check_choice("codebook", self.codebook, get_args(CodebookName))
        for bits in (self.bits, *layers.values()):
            self.specs(64, 64, bits)  # checks seed, and bits of the codebook; 64 has all rotations
        if self.statistics is not None and not isinstance(self.statistics, str):
            raise ConfigError(f"statistics must be a path or null; got {self.statistics!r}")

    def of_layer(self, layer: int) -> BitsPair:
        """Return bits of keys and values of a layer."""
        return self.layers.get(layer, self.bits)

    def specs(self, key_dim: int, value_dim: int, bits: BitsPair) -> tuple[QuantSpec, QuantSpec]:
        """Return the codes of keys and of values."""
        made = []
        rules = self.key_scale_rule, self.value_scale_rule
        for dim, each, rule in zip((key_dim, value_dim), bits, rules, strict=True):
            rotation: Rotation = "qr" if hadamard_base(dim) is None else "hadamard"
            made.append(
                QuantSpec(
                    dim,
                    each,
                    rotation=rotation,
                    seed=self.seed,
                    codebook=self.codebook,
                    scale_rule=rule,
                )
            )
        return made[0], made[1]

    def token_bytes(self, key_dim: int, value_dim: int, bits: BitsPair) -> int:
        """Return the bytes of a token of one head: codes and scales of its key and value."""
        specs = self.specs(key_dim, value_dim, bits)
        return sum(row_bytes(spec.dim, spec.bits) + SCALE_BYTES for spec in specs)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        values = asdict(self)
        values["layers"] = {str(index): list(bits) for index, bits in self.layers.items()}
        values["bits"] = list(self.bits)
        return values

    @classmethod
    def from_dict(cls, values: Any) -> Settings:
        """Build settings from JSON.

        Raises:
            ConfigError: for an unknown name or a bad value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"settings must be an object; got {values!r}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown settings {unknown}; known are {sorted(known)}")
        return cls(**values)


def _layer(index: Any) -> int:
    text = str(index)
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"layers must be numbers from 0; got {index!r}")
    return int(text)
