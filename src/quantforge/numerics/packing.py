"""Codes to bit planes and back: the canonical byte layout of a row.

A code of b bits is cut into fields of 4, 2 and 1 bits (8 stays whole), low bits first, and each
field width is a plane of its own, so no code ever spans bytes:

    bits      1    2    3      4    5      6      7        8
    planes    1    2    2+1    4    4+1    4+2    4+2+1    8

Within a plane of width w a byte holds k = 8/w channels a stride P = ceil(dim / k) apart, the
first in the lowest bits. Halves (w = 4) of a vector so land in the low and the high nibble:

    byte j        channel j     | channel j + P  | channel j + 2P | ...
    bits          0 .. w-1      | w .. 2w-1      | ...

    row           [ plane 0: P0 bytes, zeros to a multiple of 4 ][ plane 1 ... ]

Planes start on 4-byte boundaries: rows are multiples of 16 bytes for every usual dim, without
the padding that a fixed 16 would cost at head_dim 64, 80 or 96.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quantforge.spec import QuantSpec

PLANE_ALIGNMENT = 4
_FIELD_WIDTHS = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


@dataclass(frozen=True)
class Plane:
    """One bit plane of a packed row.

    Attributes:
        width: bits per field.
        shift: position of the field in the code.
        offset: first byte in the row.
        stride: bytes with data, also the distance of the channels that share a byte.
    """

    width: int
    shift: int
    offset: int
    stride: int

    @property
    def fields(self) -> int:
        """Channels per byte."""
        return 8 // self.width

    @property
    def mask(self) -> int:
        """Bits of one field, in place 0."""
        return (1 << self.width) - 1


@lru_cache(maxsize=1024)
def planes(dim: int, bits: int) -> tuple[Plane, ...]:
    """Return the planes of a row of `dim` codes of `bits` bits."""
    result, shift, offset = [], 0, 0
    for width in _FIELD_WIDTHS[bits]:
        result.append(Plane(width, shift, offset, stride=-(-dim * width // 8)))
        shift += width
        offset += _plane_bytes(dim, width)
    return tuple(result)


def _plane_bytes(dim: int, width: int) -> int:
    stride = -(-dim * width // 8)
    return -(-stride // PLANE_ALIGNMENT) * PLANE_ALIGNMENT


def row_bytes(dim: int, bits: int) -> int:
    """Return the bytes of one packed row."""
    return sum([_plane_bytes(dim, width) for width in _FIELD_WIDTHS[bits]])


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes (..., dim) into rows (..., row_bytes)."""
    dim = codes.shape[-1]
    rows = np.zeros((*codes.shape[:-1], row_bytes(dim, bits)), np.uint8)
    for plane in planes(dim, bits):
        field = (codes >> plane.shift) & plane.mask
        for slot in range(plane.fields):
            part = field[..., slot * plane.stride : (slot + 1) * plane.stride]
            start = plane.offset
            rows[..., start : start + part.shape[-1]] |= part << (slot * plane.width)
    return rows


def unpack(rows: NDArray[np.uint8], dim: int, bits: int) -> NDArray[np.uint8]:
    """Invert `pack`: rows (..., row_bytes) to codes (..., dim)."""
    codes = np.zeros((*rows.shape[:-1], dim), np.uint8)
    for plane in planes(dim, bits):
        data = rows[..., plane.offset : plane.offset + plane.stride]
        for slot in range(plane.fields):
            part = codes[..., slot * plane.stride : (slot + 1) * plane.stride]
            field = (data >> (slot * plane.width)) & plane.mask
            part |= field[..., : part.shape[-1]] << plane.shift
    return codes


def packed_width(spec: QuantSpec) -> int:
    """Return the bytes of one packed row of a spec, the QJL sign plane included."""
    width = row_bytes(spec.dim, spec.code_bits)
    return width + row_bytes(spec.dim, 1) if spec.estimator == "prod" else width
