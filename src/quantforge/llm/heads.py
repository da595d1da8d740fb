"""Heads with bits of their own: each group of heads that share a code is stored by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from quantforge.errors import ConfigError
from quantforge.llm.options import CacheConfig, pair


@dataclass(frozen=True)
class HeadGroups:
    """Key heads by their bits.

    Attributes:
        heads: of each group; together they are all heads, once.
        bits: (of keys, of values) of each group.
    """

    heads: tuple[tuple[int, ...], ...]
    bits: tuple[tuple[int, int], ...]

    @staticmethod
    def of(options: CacheConfig, kv_heads: int) -> HeadGroups | None:
        """Return the groups of `head_bits`, or None where all heads have the same bits.

        Raises:
            ConfigError: if a head does not exist.
        """
        unknown = [head for head in options.head_bits if not 0 <= head < kv_heads]
        if unknown:
            raise ConfigError(
                f"head_bits names the key heads {unknown}, but this layer has {kv_heads}: 0 to "
                f"{kv_heads - 1}"
            )
        groups: dict[tuple[int, int], list[int]] = {}
        for head in range(kv_heads):
            bits = pair(options.head_bits.get(head, options.bits))
            groups.setdefault(bits, []).append(head)
        if set(groups) == {pair(options.bits)}:
            return None
        return HeadGroups(tuple(tuple(heads) for heads in groups.values()), tuple(groups))

    def part(self, x: torch.Tensor, group: int) -> torch.Tensor:
        """Return the heads of a group of x (B, Hkv, ...)."""
        return x[:, list(self.heads[group])]

    def part_of_queries(self, x: torch.Tensor, group: int) -> torch.Tensor:
        """Return what of x (B, Hq, ...) belongs to the key heads of a group; 1 serves all heads."""
        if x.shape[1] == 1:
            return x
        return self.part(x.unflatten(1, (self.kv_heads, -1)), group).flatten(1, 2)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return (B, Hkv, ...) of the heads of each group, in the order of heads."""
        return torch.cat(tuple(parts), 1)[:, list(self._order)]

    def join_queries(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return (B, Hq, ...) of the query heads of each group, in the order of heads."""
        per_kv = sum(part.shape[1] for part in parts) // self.kv_heads
        by_head = [part.unflatten(1, (-1, per_kv)) for part in parts]
        return self.join(by_head).flatten(1, 2)

    def each(self, f: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Return f of each group, joined."""
        return self.join([f(group) for group in range(len(self.heads))])

    @property
    def kv_heads(self) -> int:
        """All key heads."""
        return len(self._order)

    @cached_property
    def _order(self) -> tuple[int, ...]:
        stored = [head for heads in self.heads for head in heads]
        return tuple(stored.index(head) for head in range(len(stored)))
