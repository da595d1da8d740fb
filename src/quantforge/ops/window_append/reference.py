"""Oracle of `window_append`: the numpy definition, one sequence of one head at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.encode import F32, encode
from quantforge.numerics.packing import unpack
from quantforge.numerics.statistics import measure
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
    """

    spec: QuantSpec
    n_sinks: int
    rows: int
    page: int
    tokens: int
    shift: F32 | None = None
    equalizer: F32 | None = None
    shifts: bool = True
    dense: list[NDArray[np.floating]] = field(default_factory=list)
    codes: list[NDArray[np.uint8]] = field(default_factory=list)
    scales: list[NDArray[np.floating]] = field(default_factory=list)
    lost: int = 0

    def append(self, x: NDArray[np.floating]) -> None:
        """Append x (q, dim)."""
        if len(self.dense) + len(x) > self.rows and len(self.codes) + self.page <= self.tokens:
            self._pack()
        if len(self.dense) + len(x) > self.rows:
            self.lost += len(x)
            return
        self.dense += list(x)

    def _pack(self) -> None:
        recent = np.stack(self.dense[self.n_sinks :])
        if self.shift is None or self.equalizer is None:
            x = recent.astype(np.float64)
            shift, equalizer = measure(x)
            if not self.shifts:  # RMS about zero: rows and their negatives have no mean
                shift, equalizer = 0 * shift, measure(np.concatenate([x, -x]))[1]
            self.shift = shift.astype(np.float32)
            self.equalizer = equalizer.astype(np.float32)
        encoded = encode(recent[: self.page], self.spec, self.shift, self.equalizer)
        self.codes += list(unpack(encoded.packed, self.spec.dim, self.spec.bits))
        self.scales += list(encoded.scales[:, 0])
        del self.dense[self.n_sinks : self.n_sinks + self.page]
