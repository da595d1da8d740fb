"""The parts of a cache that may have bits of their own: keys and values of each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantforge.errors import UnsupportedError
from quantforge.llm.cache import QuantForgeCache
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig
from quantforge.llm.replay import RecordedPrompt
from quantforge.numerics.packing import row_bytes

SCALE_BYTES = 2


@dataclass(frozen=True)
class Slot:
    """Keys or values of one layer.

    Attributes:
        layer: index.
        part: "keys" or "values".
        heads: of keys.
        dim: of a head.
        longest: tokens that the layer holds at most (sliding windows); None for all.
    """

    layer: int
    part: Literal["keys", "values"]
    heads: int
    dim: int
    longest: int | None

    def nbytes(self, bits: int, tokens: int, window: int, sinks: int, number_bytes: int) -> int:
        """Return the bytes of one sequence of so many tokens: codes, scales, sinks and window."""
        held = tokens if self.longest is None else min(tokens, self.longest)
        dense = min(held, window + (sinks if self.longest is None else 0))
        row = row_bytes(self.dim, bits) + SCALE_BYTES
        return self.heads * ((held - dense) * row + dense * self.dim * number_bytes)

    def own_nbytes(self, tokens: int, number_bytes: int) -> int:
        """Return the bytes of one sequence in the model's own cache."""
        held = tokens if self.longest is None else min(tokens, self.longest)
        return self.heads * held * self.dim * number_bytes


def slots_of(cache: QuantForgeCache, prompt: RecordedPrompt) -> tuple[Slot, ...]:
    """Return the slots of a cache made for the model that read a prompt: keys, values by layer.

    Raises:
        UnsupportedError: if no layer of the model is quantized.
    """
    slots = []
    for index, (keys, values) in prompt.shapes.items():
        layer = cache.layers[index]
        if isinstance(layer, QuantForgeLayer):
            longest = getattr(layer, "sliding_window", None)
            slots.append(Slot(index, "keys", keys[1], keys[3], longest))
            slots.append(Slot(index, "values", values[1], values[3], longest))
    if not slots:
        raise UnsupportedError(
            "no layer of this model has keys and values that QuantForgeCache quantizes; there is "
            "nothing to allocate"
        )
    return tuple(slots)


@dataclass(frozen=True)
class Plan:
    """Bits of keys and values, layer by layer, and the recent window.

    Attributes:
        bits: {layer: (bits of keys, bits of values)}.
        window: recent tokens in the model's dtype.
    """

    bits: Mapping[int, tuple[int, int]]
    window: int

    @staticmethod
    def uniform(slots: Sequence[Slot], bits: int, window: int) -> Plan:
        """Return the plan with the same bits everywhere."""
        return Plan({slot.layer: (bits, bits) for slot in slots}, window)

    @staticmethod
    def of(slots: Sequence[Slot], bits: Sequence[int], window: int) -> Plan:
        """Return the plan with bits for each slot."""
        by_slot = {(s.layer, s.part): b for s, b in zip(slots, bits, strict=True)}
        layers = dict.fromkeys(slot.layer for slot in slots)
        return Plan({i: (by_slot[i, "keys"], by_slot[i, "values"]) for i in layers}, window)

    def nbytes(self, slots: Sequence[Slot], tokens: int, number_bytes: int) -> int:
        """Return the bytes of one sequence of so many tokens."""
        sinks = CacheConfig().sinks
        return sum(
            slot.nbytes(self._of(slot), tokens, self.window, sinks, number_bytes) for slot in slots
        )

    def _of(self, slot: Slot) -> int:
        return self.bits[slot.layer][slot.part == "values"]

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of QuantForgeCache: the commonest bits, and the layers that differ."""
        common = Counter(self.bits.values()).most_common(1)[0][0]
        layers = {i: {"bits": list(pair)} for i, pair in self.bits.items() if pair != common}
        base: dict[str, Any] = {"bits": list(common), "window": self.window}
        return base | ({"layers": layers} if layers else {})

    def __str__(self) -> str:
        pairs = list(self.bits.values())
        if len(set(pairs)) == 1 and pairs[0][0] == pairs[0][1]:
            return f"{pairs[0][0]} bits everywhere"
        return " ".join(f"{k},{v}" for k, v in pairs)
