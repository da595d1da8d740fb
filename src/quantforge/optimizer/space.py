"""The settings of codes and indexes that an optimizer may choose from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import TypeAlias

from quantforge.config import QuantForgeConfig
from quantforge.errors import ConfigError
from quantforge.numerics.vectors import Mode
from quantforge.spec import CodebookName, Rotation, ScaleRule, hadamard_base
from quantforge.vectordb.config import IndexConfig, Metric

Config: TypeAlias = QuantForgeConfig | IndexConfig
CODE_FIELDS = ("bits", "rotation", "codebook", "scale_rule", "shift", "equalizer")


@dataclass(frozen=True)
class Space:
    """Values of each setting; every combination that exists is a point.

    Args:
        bits: of codes and of indexes.
        rotation: of codes.
        codebook: of codes.
        scale_rule: of codes.
        shift: of codes.
        equalizer: of codes.
        mode: of indexes; () leaves indexes out, as () in a setting of codes leaves those out.
    """

    bits: Sequence[int] = tuple(range(1, 9))
    rotation: Sequence[Rotation] = ("hadamard", "qr")
    codebook: Sequence[CodebookName] = ("lloyd_max", "gaussian", "e4m3")
    scale_rule: Sequence[ScaleRule] = ("unbiased", "norm", "mse")
    shift: Sequence[bool] = (False,)
    equalizer: Sequence[bool] = (False,)
    mode: Sequence[Mode] = ("adapted", "centred", "oblivious")

    def points(self, dim: int, metric: Metric, seed: int) -> tuple[Config, ...]:
        """Return every point for vectors of `dim` numbers, once, the defaults of its bits first.

        Raises:
            ConfigError: for a value that does not exist, or if nothing is left.
        """
        found: dict[Config, None] = {}
        found |= dict.fromkeys(self._codes(dim, seed))
        found |= dict.fromkeys(self._indexes(metric, seed))
        if not found:
            raise ConfigError(f"no setting of {self} exists for vectors of {dim} numbers")
        return tuple(found)

    def _codes(self, dim: int, seed: int) -> Iterator[QuantForgeConfig]:
        for values in product(*(getattr(self, name) for name in CODE_FIELDS)):
            settings = dict(zip(CODE_FIELDS, values, strict=True))
            if settings["rotation"] == "hadamard" and hadamard_base(dim) is None:
                continue
            if settings["codebook"] == "e4m3" and settings["bits"] > 5:
                continue
            yield QuantForgeConfig(**settings, seed=seed)

    def _indexes(self, metric: Metric, seed: int) -> Iterator[IndexConfig]:
        for bits, mode in product(self.bits, self.mode):
            yield IndexConfig(bits=bits, mode=mode, metric=metric, seed=seed)


def baseline(config: Config, dim: int) -> Config:
    """Return the defaults at the bits, metric and seed of a config: what it must beat."""
    if isinstance(config, IndexConfig):
        return IndexConfig(bits=config.bits, metric=config.metric, seed=config.seed)
    rotation: Rotation = "qr" if hadamard_base(dim) is None else "hadamard"
    return QuantForgeConfig(bits=config.bits, rotation=rotation, seed=config.seed)


def name(config: Config) -> str:
    """Return the settings that differ from the defaults, in words."""
    default = type(config)(bits=config.bits)
    kind = "index" if isinstance(config, IndexConfig) else "codes"
    shown = ["mode" if kind == "index" else "rotation"]
    shown += [f.name for f in fields(config) if f.name not in (*shown, "bits", "metric", "seed")]
    parts = [
        str(value) if isinstance(value, str) else field
        for field in shown
        if (value := getattr(config, field)) != getattr(default, field) or field == shown[0]
    ]
    return f"{kind}, {config.bits} bits, {', '.join(parts)}"
