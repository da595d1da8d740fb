"""Token importance: which tokens of a head get more bits, and where their rows are.

Tokens leave the window in blocks of slots. In each block, and for each key head of its own, the
tokens with the most attention go to tiers of more bits:

    slots (one head)   0 1 2 3 4 5 6 7 | 8 9 ...        order of the text
    tier               0 0 2 0 1 0 0 0 | 1 0 ...        uint8, kept
    rows of tier 0     0 1 3 5 6 7 | 9 ...              packed with `bits`
    rows of tier 1     4 | 8 ...                        packed with `importance[0]`
    rows of tier 2     2 | ...                          packed with `importance[1]`

A block has the same number of tokens in a tier in every head, so shapes stay regular. Attention
does not depend on the order of tokens: it runs over each tier as it lies, and only masks and views
by position look up where a slot is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


def choose(mass: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return the tier (B, Hkv, n), uint8, of tokens with some attention mass.

    Args:
        mass: (B, Hkv, n).
        counts: tokens of each tier, the first has the fewest bits; they sum to n.
    """
    tiers = torch.zeros_like(mass, dtype=torch.uint8)
    raised = sum(counts[1:])
    best = mass.topk(raised, dim=-1).indices  # most attention first
    stop = raised
    for tier, count in enumerate(counts[1:], 1):
        tiers.scatter_(2, best[:, :, stop - count : stop], tier)
        stop -= count
    return tiers


@dataclass(frozen=True, eq=False)
class Slots:
    """Where the packed tokens of a layer are.

    Attributes:
        tiers: (B, Hkv, slots) uint8, tier of each slot.
        blocks: tokens of each tier, for each block.
        dead: slots [start, stop) that were cropped while their block lives on.
    """

    tiers: torch.Tensor
    blocks: tuple[tuple[int, ...], ...] = ()
    dead: tuple[tuple[int, int], ...] = ()

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each tier, dead ones included."""
        return tuple(sum(column) for column in zip(*self.blocks, strict=True))

    @property
    def alive(self) -> int:
        """Tokens held."""
        return self.tiers.shape[2] - sum(stop - start for start, stop in self.dead)

    @property
    def nbytes(self) -> int:
        """Bytes of the map."""
        return self.tiers.numel()

    def appended(self, tiers: torch.Tensor, counts: Sequence[int]) -> Slots:
        """Return the slots with a block behind them."""
        joined = torch.cat([self.tiers, tiers], 2)
        return Slots(joined, (*self.blocks, tuple(counts)), self.dead)

    def cropped(self, tokens: int) -> Slots:
        """Return the slots without the last tokens: whole blocks go, others keep dead slots."""
        blocks, dead, n = list(self.blocks), list(self.dead), self.tiers.shape[2]
        while tokens and blocks:
            size = sum(blocks[-1])
            gone = [(a, b) for a, b in dead if a >= n - size]
            alive = size - sum(b - a for a, b in gone)
            if tokens < alive:
                # dead slots of a block are its last ones
                stop = n - (size - alive)
                dead = [span for span in dead if span not in gone] + [(stop - tokens, n)]
                break
            blocks.pop()
            dead = [span for span in dead if span not in gone]
            tokens, n = tokens - alive, n - size
        return Slots(self.tiers[:, :, :n], tuple(blocks), tuple(dead))

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> Slots:
        """Return the slots with f applied to the map."""
        return Slots(f(self.tiers), self.blocks, self.dead)

    @cached_property
    def _order(self) -> torch.Tensor:
        """Slots (B, Hkv, slots) in the order of their rows, tier after tier."""
        return self.tiers.argsort(dim=2, stable=True)

    @cached_property
    def row_of(self) -> torch.Tensor:
        """Row (B, Hkv, alive) of each token held, counted over the tiers one after the other."""
        row = self._order.argsort(dim=2)
        if not self.dead:
            return row
        return row[:, :, self._alive_slots(row.device)]

    def places(self, tier: int) -> torch.Tensor:
        """Return the token (B, Hkv, rows) that each row of a tier holds, -1 for dead rows."""
        start = sum(self.rows[:tier])
        slots = self._order[:, :, start : start + self.rows[tier]]
        if not self.dead:
            return slots
        place = torch.full((self.tiers.shape[2],), -1, device=slots.device)
        alive = self._alive_slots(slots.device)
        place[alive] = torch.arange(len(alive), device=slots.device)
        return place[slots]

    def _alive_slots(self, device: torch.device) -> torch.Tensor:
        alive = torch.ones(self.tiers.shape[2], dtype=torch.bool)
        for start, stop in self.dead:
            alive[start:stop] = False
        return alive.nonzero().squeeze(1).to(device)
