"""The page layout that fused decode attention reads: codes in the order of their table lookup.

A page holds T tokens of one head. Tensor cores want pairs along the axis they contract, so keys
are stored token by token and values channel by channel:

    keys     [ T rows of D codes, plane 0 ][ plane 1 ][ T fp16 scales ]
    values   [ D rows of T codes, plane 0 ][ plane 1 ][ T fp16 scales ]

A row is cut into P = 2 (4 bits) or 4 (2, 3 bits) parts of n / P codes, one for each output of the
lookup. Words of 32 bits hold four neighbours i = 0..3 of every part, where `prmt` finds them:

    4 bits   nibble  7   6   5   4   3   2   1   0
             part    1   1   1   1   0   0   0   0       bits 0-2: magnitude index
             i       3   2   1   0   3   2   1   0
             bit 3 of nibble 2i + 1: sign of (part 0, i); of nibble 2i: sign of (part 1, i)

    2 bits   nibble 4 (p % 2) + i, bits 0-1 for parts p = 0, 1 and bits 2-3 for parts 2, 3

    3 bits   plane 0: the two low bits, as 2 bits
             plane 1: the high bits; word w serves words w (h = 0) and w + half (h = 1) of plane 0:
             bit 2 (p // 2) + h of nibble 4 (p % 2) + i

So the selectors of four lookups cost one mask and one shift, signs one `lop3`, and nothing is
shuffled. Scales stand in the order in which the lanes of a warp need them (`scale_order`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.codebook import is_symmetric
from quantforge.spec import QuantSpec

PAGE_BITS = (2, 3, 4)
"""Codes that have a page layout; others stay in rows (`numerics.packing`)."""
PAGE_DIMS = {2: (128, 256), 3: (128,), 4: (64, 128, 256)}
"""Dims of keys and values by bits: parts must fill whole tensor-core operands."""
SCALE_BYTES = 2


@dataclass(frozen=True)
class PageLayout:
    """Where everything is in the pages of keys and values.

    Attributes:
        tokens: tokens in a page.
        key_dim: channels of a key.
        value_dim: channels of a value.
        key_bits: bits of a key code.
        value_bits: bits of a value code.
    """

    tokens: int
    key_dim: int
    value_dim: int
    key_bits: int
    value_bits: int

    @property
    def key_bytes(self) -> int:
        """Bytes of a page of keys, scales included."""
        return self.tokens * (self.key_dim * self.key_bits // 8 + SCALE_BYTES)

    @property
    def value_bytes(self) -> int:
        """Bytes of a page of values, scales included."""
        return self.tokens * (self.value_dim * self.value_bits // 8 + SCALE_BYTES)


def why_no_pages(key: QuantSpec, value: QuantSpec) -> str | None:
    """Return why keys and values of these specs have no page layout, or None."""
    for name, spec in (("keys", key), ("values", value)):
        if spec.estimator != "mse" or spec.scale_dtype != "float16":
            return f'{name} need estimator="mse" and float16 scales'
        if not is_symmetric(spec):
            return f"{name} have a codebook that is not symmetric"
        if spec.bits not in PAGE_BITS:
            return f"{name} have {spec.bits} bits; pages hold {PAGE_BITS}"
        if spec.dim not in PAGE_DIMS[spec.bits]:
            return (
                f"{name} of {spec.bits} bits have dim {spec.dim}; pages hold {PAGE_DIMS[spec.bits]}"
            )
    return None


def page_layout(key: QuantSpec, value: QuantSpec) -> PageLayout:
    """Return the layout for two specs that `why_no_pages` has nothing against."""
    tokens = 64 if key.bits == value.bits == 4 else 128
    return PageLayout(tokens, key.dim, value.dim, key.bits, value.bits)


def symbols(bits: int) -> NDArray[np.uint8]:
    """Return what is stored for each code: itself, or sign and magnitude index at 4 bits."""
    codes = np.arange(1 << bits, dtype=np.uint8)
    return codes if bits < 4 else np.where(codes >= 8, codes ^ 8, codes ^ 15)


@dataclass(frozen=True, eq=False)
class BitMap:
    """For each bit of a plane of a row, little-endian: the code it belongs to and the bit of it.

    Attributes:
        code: (bytes, 8) index of the code.
        bit: (bytes, 8) bit of its symbol.
    """

    code: NDArray[np.int64]
    bit: NDArray[np.int64]


@lru_cache(maxsize=64)
def bit_maps(length: int, bits: int) -> tuple[BitMap, ...]:
    """Return the planes of a row of `length` codes."""
    parts = 2 if bits == 4 else 4
    part_length = length // parts
    maps = []
    for plane in range(2 if bits == 3 else 1):
        width = bits if bits != 3 else 2 - plane
        code = np.empty(length * width, np.int64)
        bit = np.empty(length * width, np.int64)
        for index in range(length):
            part, offset = divmod(index, part_length)
            word, i = divmod(offset, 4)
            for k in range(width):
                position = _bit_position(bits, plane, part, word, i, k, part_length // 4)
                code[position], bit[position] = index, k + 2 * plane
        maps.append(BitMap(code.reshape(-1, 8), bit.reshape(-1, 8)))
    return tuple(maps)


def _bit_position(bits: int, plane: int, part: int, word: int, i: int, k: int, words: int) -> int:
    """Return where bit k of a field goes, counted from the start of the row's plane."""
    nibble = 4 * (part % 2) + i
    if bits == 4:
        if k == 3:
            return 32 * word + 8 * i + (7 if part == 0 else 3)
        return 32 * word + 4 * nibble + k
    if plane == 0:
        return 32 * word + 4 * nibble + 2 * (part // 2) + k
    half, rest = divmod(word, words // 2)
    return 32 * rest + 4 * nibble + 2 * (part // 2) + half


@lru_cache(maxsize=8)
def token_order(tokens: int) -> NDArray[np.int64]:
    """Return the token in each row of a tile of keys, and so of the scores.

    Scores come out of one tensor-core instruction and go into the next as an operand; with rows in
    this order that needs no exchange of registers. Bits of the row b4 b3 b2 b1 b0 become b3 b2 b1
    b4 b0.
    """
    row = np.arange(tokens)
    return row // 32 * 32 + row % 2 + row // 16 % 2 * 2 + row // 2 % 4 * 4 + row // 8 % 2 * 16


@lru_cache(maxsize=8)
def scale_order(tokens: int) -> NDArray[np.int64]:
    """Return the token of each stored scale: lane group g holds those of rows g, g + 8, ..."""
    return token_order(tokens).reshape(tokens // 8, 8).T.reshape(-1)


def pack_rows(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes (..., rows, n) into bytes (..., rows * n * bits / 8), plane after plane."""
    stored = symbols(bits)[codes]
    planes = []
    for plane in bit_maps(codes.shape[-1], bits):
        field = (stored[..., plane.code] >> plane.bit) & 1
        data = (field << np.arange(8)).sum(-1).astype(np.uint8)
        planes.append(data.reshape(*codes.shape[:-2], -1))
    return np.concatenate(planes, axis=-1)


def unpack_rows(data: NDArray[np.uint8], rows: int, length: int, bits: int) -> NDArray[np.uint8]:
    """Invert `pack_rows`: bytes (..., rows * length * bits / 8) to codes (..., rows, length)."""
    stored = np.zeros((*data.shape[:-1], rows, length), np.uint8)
    start = 0
    for plane in bit_maps(length, bits):
        width = plane.code.shape[0]
        part = data[..., start : start + rows * width].reshape(*data.shape[:-1], rows, width, 1)
        start += rows * width
        field = ((part >> np.arange(8, dtype=np.uint8)) & 1) << plane.bit.astype(np.uint8)
        for position in range(8):  # a code has at most one bit in each position of its bytes
            for byte in range(width):
                stored[..., plane.code[byte, position]] |= field[..., byte, position]
    return np.argsort(symbols(bits)).astype(np.uint8)[stored]
