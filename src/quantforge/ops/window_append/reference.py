"""Oracle of `window_append`: the numpy definition, one sequence of one head at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.encode import F32, encode
from quantforge.numerics.packing import unpack
from quantforge.numerics.statistics import key_equalizer
from quantforge.spec import QuantSpec


@dataclass
class Head:
    """Keys or values of one head: what a window holds, without its buffers.

    Attributes:
        spec: the code.
        n_sinks: rows that are never packed.
        rows: capacity of dense rows.
        page: tokens packed at a time.
        tokens: capacity of packed tokens.
        shift: as measured, or as given.
        equalizer: likewise.
        shifts: whether a shift is measured; else channels are coded about zero.
        query_rms: of the channels of the queries seen, or None.
    """

    spec: QuantSpec
    n_sinks: int
    rows: int
    page: int
    tokens: int
    shift: F32 | None = None
    equalizer: F32 | None = None
    shifts: bool = True
    query_rms: NDArray[np.float64] | None = None
    dense: list[NDArray[np.floating]] = field(default_factory=list)
    codes: list[NDArray[np.uint8]] = field(default_factory=list)
    scales: list[NDArray[np.floating]] = field(default_factory=list)
    lost: int = 0

    def append(self, x: NDArray[np.floating]) -> None:
        """Append x (q, dim)."""
        kept = len(self.codes) % self.page
        fits = len(self.codes) - kept + self.page <= self.tokens
        if len(self.dense) + len(x) > self.rows - kept and fits:
            self._pack(self.page - kept)
        if len(self.dense) + len(x) > self.rows:
            self.lost += len(x)
            return
        self.dense += list(x)

    def crop(self, n_packed: int, n_dense: int) -> None:
        """Keep the first packed tokens and dense rows."""
        del self.codes[n_packed:], self.scales[n_packed:], self.dense[n_dense:]

    def _pack(self, tokens: int) -> None:
        recent = np.stack(self.dense[self.n_sinks :])
        if self.shift is None or self.equalizer is None:
            x = recent.astype(np.float64)
            shift = x.mean(0, keepdims=True) * self.shifts
            rms = np.sqrt(np.square(x - shift).mean(0, keepdims=True))
            queries = np.ones_like(rms) if self.query_rms is None else self.query_rms
            equalizer = key_equalizer(rms, queries)
            self.shift = shift.astype(np.float32)
            self.equalizer = equalizer.astype(np.float32)
        encoded = encode(recent[:tokens], self.spec, self.shift, self.equalizer)
        self.codes += list(unpack(encoded.packed, self.spec.dim, self.spec.bits))
        self.scales += list(encoded.scales[:, 0])
        del self.dense[self.n_sinks : self.n_sinks + tokens]
