"""Codebooks and queries as integers: their products are exact, so backends find the same rows.

    <q, c>  ~=  query_unit * table_unit * sum of z t        z of the query, t of the code

    bits      t                    z
    1-5       within +-63          within +-127, less where 16-bit sums could overflow
    6-8       within +-2047        within +-2047, less for very long vectors

AVX2 multiplies pairs of bytes into 16-bit sums. It may add `SPANS[bits]` dwords of four channels
before it must widen them; so a query is rounded to integers for which no such sum overflows. The
channels of one sum follow each other in the plane of the widest fields (`lanes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.packing import planes
from quantforge.spec import QuantSpec

NARROW_BITS = 5
PEAKS = {1: 1, 2: 10, 3: 31, 4: 63, 5: 63, 6: 2047, 7: 2047, 8: 2047}
"""Greatest integer of a table, by bits."""
SPANS = {1: 64, 2: 32, 3: 16, 4: 4, 5: 4}
"""Dwords of four channels whose products are added in 16 bits, by bits."""
MAX_QUERY = {False: 127, True: 2047}
"""Greatest integer of a query, by whether the code is wide."""


@dataclass(frozen=True, eq=False)
class IntegerTable:
    """A codebook in integers.

    Attributes:
        values: (2^bits,) int16.
        unit: centroids ~= unit * values.
        bias: values + bias are from 0 to 2 bias.
        most: greatest integer of a query.
        room: most that the positive, or the negative, integers of a lane may add up to; 0: any.
    """

    values: NDArray[np.int16]
    unit: np.float32
    bias: int
    most: int
    room: int


def is_wide(bits: int) -> bool:
    """Return whether codes of so many bits take 16-bit integers."""
    return bits > NARROW_BITS


@lru_cache(maxsize=256)
def integer_table(spec: QuantSpec) -> IntegerTable:
    """Return the table of a spec: its codebook times the number that rounds best."""
    exact = codebook_of(spec).centroids.astype(np.float64)
    top, peak, wide = np.abs(exact).max(), PEAKS[spec.bits], is_wide(spec.bits)
    peaks = np.arange(peak / 2, peak + 0.01, 0.125) if not wide and peak > 1 else np.array([peak])
    scaled = exact * (peaks / top)[:, None]
    errors = np.square((np.rint(scaled) - scaled) * (top / peaks)[:, None]).sum(-1)
    best = float(peaks[int(np.argmin(errors))])
    values = np.rint(exact * (best / top)).astype(np.int16)
    bias = int(np.abs(values).max())
    most, room = MAX_QUERY[wide], 0
    if wide:
        most = min(most, (2**31 - 1) // (bias * spec.dim))
    else:
        span = SPANS[spec.bits]
        room = (2**15 - 1) // (2 * bias) - 2 * span  # rounding adds a half to each of 2 span terms
    return IntegerTable(values, np.float32(top / best), bias, most, room)


@lru_cache(maxsize=256)
def places(spec: QuantSpec) -> NDArray[np.int64]:
    """Return the place (dim,) of each channel when four channels share a dword.

    A dword holds a field of four bytes of the first plane; dwords follow each other by field, then
    by byte.
    """
    plane = planes(spec.dim, spec.bits)[0]
    channel = np.arange(spec.dim)
    return channel // plane.stride * (-(-plane.stride // 4) * 4) + channel % plane.stride


@lru_cache(maxsize=256)
def lanes(spec: QuantSpec) -> NDArray[np.int64]:
    """Return the 16-bit sum (dim,) that each channel of a narrow code is added to."""
    place = places(spec)
    return place // (4 * SPANS[spec.bits]) * 2 + place // 2 % 2


def query_integers(
    query: NDArray[np.float32], spec: QuantSpec
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Round finite queries (q, dim) to integers (q, dim), with the unit (q,) of each."""
    table = integer_table(spec)
    peak = np.abs(query).max(-1, initial=0).astype(np.float32)[:, None]
    share = np.divide(query, peak, out=np.zeros_like(query), where=peak > 0)
    found = np.rint(share * np.float32(table.most)).astype(np.int64)
    most = np.full(len(query), table.most, np.int64)
    if table.room:
        sums = np.zeros((2, len(query), int(lanes(spec).max()) + 1), np.int64)
        for i, lane in enumerate(lanes(spec)):
            sums[0, :, lane] += np.maximum(found[:, i], 0)
            sums[1, :, lane] += np.maximum(-found[:, i], 0)
        worst = np.maximum(sums.max((0, 2)), 1)
        most = np.where(worst > table.room, table.room * table.most // worst, table.most)
        found = np.rint(share * most.astype(np.float32)[:, None]).astype(np.int64)
    return found, peak[:, 0] / most.astype(np.float32)
