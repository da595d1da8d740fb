"""What a user chooses of an index."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, get_args

from quantforge import settings
from quantforge.errors import ConfigError
from quantforge.numerics.vectors import Mode
from quantforge.spec import MAX_BITS, check_choice, check_int

MAX_LISTS = 1 << 20
LISTS_FROM = 10_000
"""Vectors from which on an index has lists, if nobody says how many."""
MIN_LIST = 32
"""Vectors in a list, on average, before lists are made by themselves."""

Metric = Literal["ip", "cosine", "l2"]
Originals = Literal["none", "float16", "int8"]


@dataclass(frozen=True)
class IndexConfig:
    """How an index codes and compares vectors.

    Args:
        bits: bits per number, 1-8, on average over the directions.
        mode: "adapted" (PCA, bits where the variance is), "centred" (mean and equalizer) or
            "oblivious" (nothing is learned).
        metric: "ip" (inner product), "cosine" or "l2" (squared distance, least first).
        nlist: lists (IVF). None is automatic: one, scanned in full, below 10,000 vectors, and about
            2 sqrt(n) above; 0 is always one.
        nprobe: lists that a search looks into; None takes what reaches recall 0.95 in a sample.
        originals: "float16" or "int8" keeps the vectors too, for `search(..., rerank=m)`; or
            "none".
        seed: of the rotations.

    Raises:
        ConfigError: for a value outside these choices.
    """

    bits: int = 4
    mode: Mode = "adapted"
    metric: Metric = "ip"
    nlist: int | None = None
    nprobe: int | None = None
    originals: Originals = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("bits", self.bits, 1, MAX_BITS)
        check_int("seed", self.seed, 0, 2**32 - 1)
        if self.nlist is not None:
            check_int("nlist", self.nlist, 0, MAX_LISTS)
        if self.nprobe is not None:
            check_int("nprobe", self.nprobe, 1, MAX_LISTS)
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("metric", self.metric, get_args(Metric))
        check_choice("originals", self.originals, get_args(Originals))

    def lists_for(self, n: int) -> int:
        """Return how many lists n vectors are given, at least 1."""
        if self.nlist is None:
            return 1 if n < LISTS_FROM else 2 ** round(math.log2(2 * math.sqrt(n)))
        return self.nlist if self.nlist > 1 and n >= MIN_LIST * self.nlist else 1

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IndexConfig:
        """Build a config from plain values.

        Raises:
            ConfigError: for an unknown name or a bad value.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown settings {unknown}; known are {sorted(known)}")
        return cls(**values)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the settings into a JSON file for `from_file`."""
        settings.write(path, {"index": self.to_dict()})

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> IndexConfig:
        """Read the section "index" of a file of settings.

        Raises:
            FormatError: for a file of another kind or of a later version.
            ConfigError: for a bad setting, with its name.
        """
        return settings.read(path, "index", cls.from_dict)
