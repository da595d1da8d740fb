"""Settings of a quantized KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from quantforge.config import QuantForgeConfig
from quantforge.errors import ConfigError
from quantforge.spec import QuantSpec, ScaleRule, check_choice, check_int, codebook_text

Layout = Literal["auto", "pages", "rows"]
Bits = int | tuple[int, int]
"""Bits per number; or a pair, of keys and values."""


@dataclass(frozen=True)
class CacheConfig:
    """How a layer stores its keys and values. The defaults are the best measured (docs/LOG.md).

    Args:
        bits: bits per number, 1-8; or a pair for keys and values.
        sinks: first tokens kept in the model's dtype.
        window: recent tokens kept in the model's dtype.
        page_size: tokens quantized at a time, when they leave the window.
        shift: subtract the mean key and value of each head, measured when the first page is
            packed and frozen. Attention cancels a key shift; without it a large key bias (Qwen2)
            takes all bits.
        equalizer: divide channels by the square root of their RMS, measured likewise. Without it
            outlier channels take the bits of the others. Channels of keys are divided by
            sqrt(rms(key) / rms(query)) where the queries are seen, which is where attention goes
            through SDPA or matmul (`attn_implementation="sdpa"` or `"eager"`).
        importance: bits, above `bits` and in rising order, of tiers for tokens that receive
            attention: (4, 8) with `bits=2`. Each key head chooses its own tokens, when they leave
            the window, by the attention of its latest queries; () for none.
        budget: mean bits per number of the packed tokens, their scales and the map of tiers
            included. What it leaves beyond `bits` is shared equally by the tiers of `importance`.
        head_bits: {key head: bits} of heads that differ from `bits`, in keys, values or both. Heads
            of the same bits are stored and attended to together, each such group by itself.
        outlier_bits: bits, above `bits`, of heads that still have outliers once their channels are
            equalized: found when the first page is packed, and reported. None leaves them.
        key_scale_rule: what the scale of a key preserves.
        value_scale_rule: what the scale of a value preserves.
        codebook: see `QuantSpec`; centroids of your own go with one number of bits for all.
        seed: seed of the rotation.
        layout: "pages" of tokens, which fused decode attention reads, or "rows"; "auto" takes pages
            where the GPU, the dtype and the codes have that kernel.

    Raises:
        ConfigError: for a value out of range.
    """

    bits: Bits = 4
    sinks: int = 16
    window: int = 128
    page_size: int = 64
    shift: bool = True
    equalizer: bool = True
    importance: tuple[Bits, ...] = ()
    budget: float | None = None
    head_bits: Mapping[int, Bits] = field(default_factory=dict, hash=False)
    outlier_bits: Bits | None = None
    key_scale_rule: ScaleRule = "norm"
    value_scale_rule: ScaleRule = "unbiased"
    codebook: str = "lloyd_max"
    seed: int = 0
    layout: Layout = "auto"

    def __post_init__(self) -> None:
        check_int("sinks", self.sinks, 0, 1 << 20)
        check_int("window", self.window, 0, 1 << 20)
        check_int("page_size", self.page_size, 1, 1 << 16)
        check_choice("layout", self.layout, get_args(Layout))
        object.__setattr__(self, "codebook", codebook_text(self.codebook))
        heads = {int(head): _checked(bits) for head, bits in self.head_bits.items()}
        object.__setattr__(self, "bits", _checked(self.bits))
        object.__setattr__(self, "importance", tuple(map(_checked, self.importance)))
        object.__setattr__(self, "head_bits", heads)
        more = () if self.outlier_bits is None else (_checked(self.outlier_bits),)
        object.__setattr__(self, "outlier_bits", more[0] if more else None)
        for bits in (self.bits, *self.importance, *heads.values(), *more):
            key, value = pair(bits)  # check the rest; dim 64 has every rotation
            self._spec(64, key, self.key_scale_rule), self._spec(64, value, self.value_scale_rule)
        self._check_tiers()

    def _check_tiers(self) -> None:
        rising = [sum(pair(bits)) for bits in (self.bits, *self.importance)]
        if any(a >= b for a, b in pairwise(rising)):
            raise ConfigError(
                "importance lists tiers of more bits than `bits`, in rising order; got "
                f"bits={self.bits!r} and importance={self.importance!r}"
            )
        if bool(self.importance) != (self.budget is not None):
            raise ConfigError(
                "importance and budget belong together: tiers for important tokens, and the mean "
                f"bits per number they may use; got {self.importance!r} and {self.budget!r}"
            )
        if self.importance and self.head_bits:
            raise ConfigError("importance and head_bits exclude each other; use one of them")
        if self.outlier_bits is not None:
            self._check_outlier_bits(self.outlier_bits)
        if self.budget is not None and not rising[0] / 2 < self.budget < rising[1] / 2 + 1:
            raise ConfigError(
                f"budget must lie above the {rising[0] / 2:g} bits of all tokens and below the "
                f"{rising[1] / 2:g} bits of the first tier; got {self.budget}"
            )

    def _check_outlier_bits(self, bits: Bits) -> None:
        if self.importance or self.head_bits:
            raise ConfigError("outlier_bits excludes importance and head_bits; use one of them")
        if any(a < b for a, b in zip(pair(bits), pair(self.bits), strict=True)):
            raise ConfigError(f"outlier_bits must not be below bits={self.bits!r}; got {bits!r}")

    @property
    def tiers(self) -> tuple[tuple[int, int], ...]:
        """Bits of keys and values of each tier, the one of ordinary tokens first."""
        return tuple(pair(bits) for bits in (self.bits, *self.importance))

    def shares(self, key_dim: int, value_dim: int) -> tuple[float, ...]:
        """Return the share of tokens in each tier of `importance` that meets the budget.

        Raises:
            ConfigError: if scales and map alone exceed the budget.
        """
        if self.budget is None:
            return ()
        scales, tier_map = 2 * 16, 8
        cost = [k * key_dim + v * value_dim for k, v in self.tiers]
        left = self.budget * (key_dim + value_dim) - scales - tier_map - cost[0]
        if left < 0:
            least = (cost[0] + scales + tier_map) / (key_dim + value_dim)
            raise ConfigError(
                f"budget={self.budget} is less than all tokens need at bits={self.bits}: "
                f"{least:.3f} with their scales at head dims {key_dim} and {value_dim}"
            )
        shares = tuple(left / len(self.importance) / (c - cost[0]) for c in cost[1:])
        if sum(shares) >= 1:
            raise ConfigError(
                f"budget={self.budget} would raise every token above bits={self.bits}; use more "
                "bits for all instead"
            )
        return shares

    def key_spec(self, dim: int, tier: int = 0) -> QuantSpec:
        """Return the code of keys of `dim` numbers."""
        return self._spec(dim, self.tiers[tier][0], self.key_scale_rule)

    def value_spec(self, dim: int, tier: int = 0) -> QuantSpec:
        """Return the code of values of `dim` numbers."""
        return self._spec(dim, self.tiers[tier][1], self.value_scale_rule)

    @staticmethod
    def code(spec: QuantSpec, bits: int) -> QuantSpec:
        """Return a code with other bits."""
        return replace(spec, bits=bits)

    def _spec(self, dim: int, bits: int, scale_rule: ScaleRule) -> QuantSpec:
        config = QuantForgeConfig(
            bits=bits, codebook=self.codebook, scale_rule=scale_rule, seed=self.seed
        )
        return config.spec(dim)


def _checked(bits: Any) -> Bits:
    """Return bits, a list as read from JSON as a pair."""
    if isinstance(bits, int):
        return bits
    if not isinstance(bits, tuple | list) or len(bits) != 2:
        raise ConfigError(f"bits must be a number or a pair (keys, values); got {bits!r}")
    return tuple(bits)


def pair(bits: Bits) -> tuple[int, int]:
    """Return bits of keys and of values."""
    return (bits, bits) if isinstance(bits, int) else (bits[0], bits[1])
