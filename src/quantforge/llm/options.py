"""Settings of a quantized KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from quantforge.config import QuantForgeConfig
from quantforge.errors import ConfigError
from quantforge.spec import CodebookName, QuantSpec, ScaleRule, check_choice, check_int

Layout = Literal["auto", "pages", "rows"]


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
            outlier channels take the bits of the others.
        key_scale_rule: what the scale of a key preserves.
        value_scale_rule: what the scale of a value preserves.
        codebook: see `QuantSpec`.
        seed: seed of the rotation.
        layout: "pages" of tokens, which fused decode attention reads, or "rows"; "auto" takes pages
            where the GPU, the dtype and the codes have that kernel.

    Raises:
        ConfigError: for a value out of range.
    """

    bits: int | tuple[int, int] = 4
    sinks: int = 16
    window: int = 128
    page_size: int = 64
    shift: bool = True
    equalizer: bool = True
    key_scale_rule: ScaleRule = "norm"
    value_scale_rule: ScaleRule = "unbiased"
    codebook: CodebookName = "lloyd_max"
    seed: int = 0
    layout: Layout = "auto"

    def __post_init__(self) -> None:
        check_int("sinks", self.sinks, 0, 1 << 20)
        check_int("window", self.window, 0, 1 << 20)
        check_int("page_size", self.page_size, 1, 1 << 16)
        check_choice("layout", self.layout, get_args(Layout))
        if not isinstance(self.bits, int) and len(self.bits) != 2:
            raise ConfigError(f"bits must be a number or a pair (keys, values); got {self.bits!r}")
        self.key_spec(64), self.value_spec(64)  # check the rest; dim 64 has every rotation

    def key_spec(self, dim: int) -> QuantSpec:
        """Return the code of keys of `dim` numbers."""
        bits = self.bits if isinstance(self.bits, int) else self.bits[0]
        return self._spec(dim, bits, self.key_scale_rule)

    def value_spec(self, dim: int) -> QuantSpec:
        """Return the code of values of `dim` numbers."""
        bits = self.bits if isinstance(self.bits, int) else self.bits[1]
        return self._spec(dim, bits, self.value_scale_rule)

    def _spec(self, dim: int, bits: int, scale_rule: ScaleRule) -> QuantSpec:
        config = QuantForgeConfig(
            bits=bits, codebook=self.codebook, scale_rule=scale_rule, seed=self.seed
        )
        return config.spec(dim)
