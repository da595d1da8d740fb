"""Packed bytes to centroids, one by one: an element of a result depends on its own byte alone.

A row's base plane has `8 / width` fields in a byte, so a tile of bytes becomes as many tiles of
centroids, `parts`, of the same shape. Channels stay where the canonical layout has them:

    part p, column j     channel `p * stride + j`             (zeros of weight where there is none)

The compiler may then place, transpose and convert tiles as it likes, which attention needs: it
contracts keys along channels and values along tokens. (`decode` is faster for keys alone: its
columns are in the order of the lookup, which holds in one arrangement of registers only.)

    "table"    centroids gathered from a table in memory that stays in L1: any bits, dim and GPU
    "permute"  1-4 bits on NVIDIA, fp16: `prmt` looks up four nibbles at once

"permute" first makes words of eight nibbles of which the low four are one part of four bytes and
the high four another, then looks up the high and low bytes of fp16 centroids apart:

    4 bits     (w: four bytes)  low nibbles, high nibbles of w            -> parts 0, 1
    2 bits     w & 0x33..  -> parts 0, 2     w >> 2 & 0x33..              -> parts 1, 3
    1 bit      w >> i & 0x11..                                            -> parts i, i + 4
    3 bits     as 2 bits, with bit 2 from the 1-bit plane: byte j holds channels j + P i, P half a
               stride, so the upper half of the columns takes odd fields

Instructions per code by bits 4, 3, 2, 1: permute 3.3, 2.3, 1.9, 1.9 (of the programs below, moves
by nothing left out); table 6-9, of which one is a gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.packing import planes
from quantforge.ops import constants
from quantforge.spec import QuantSpec

MAX_PERMUTE_BITS = 4
_NIBBLE_WORDS = {1: 4, 2: 2, 3: 2, 4: 1}
_FIELDS = {1: 0x11111111, 2: 0x33333333, 3: 0x33333333}


@dataclass(frozen=True)
class Codes:
    """How a kernel reads the rows of a spec: hashable, a constant of compilation.

    Attributes:
        bits: of a code.
        parts: tiles that a tile of bytes becomes.
        stride: bytes of the base plane, and columns with data.
        columns: columns of a tile, a power of two.
        alignment: divides the address of every plane of every row.
        planes: (width, shift, offset, stride) of each plane.
        permute: whether centroids are looked up by permutes; then `text` and `constraints`.
        text: inline PTX.
        constraints: of its operands.
    """

    bits: int
    parts: int
    stride: int
    columns: int
    alignment: int
    planes: tuple[tuple[int, int, int, int], ...]
    permute: bool
    text: str = ""
    constraints: str = ""

    @property
    def width(self) -> int:
        """Columns of all parts."""
        return self.parts * self.columns


def permutes(spec: QuantSpec) -> bool:
    """Return whether the codes of a spec can be looked up by permutes."""
    return spec.code_bits <= MAX_PERMUTE_BITS and (spec.code_bits != 3 or spec.dim % 8 == 0)


@lru_cache(maxsize=256)
def codes_of(spec: QuantSpec, alignment: int, permute: bool) -> Codes:
    """Return how to read the rows of a spec at addresses that are multiples of `alignment`."""
    layout = planes(spec.dim, spec.code_bits)
    base = layout[0]
    columns = max(16, triton.next_power_of_2(base.stride))
    fields = tuple((p.width, p.shift, p.offset, p.stride) for p in layout)
    text, constraints = program(spec.code_bits) if permute else ("", "")
    return Codes(
        spec.code_bits, base.fields, base.stride, columns, alignment, fields, permute,
        text, constraints,
    )  # fmt: skip


@lru_cache(maxsize=256)
def channel_of_column(spec: QuantSpec) -> np.ndarray:
    """Return the channel of each of `Codes.width` columns; `dim` stands for none."""
    codes = codes_of(spec, 1, False)
    column = np.arange(codes.columns)
    channel = np.arange(codes.parts)[:, None] * codes.stride + column
    valid = (column < codes.stride) & (channel < spec.dim)
    return np.where(valid, channel, spec.dim).reshape(-1)


@constants.cached_constant
def basis(spec: QuantSpec, device: torch.device) -> torch.Tensor:
    """Return the rotation with its rows in the order of columns, (width, dim) float32.

    A query times its transpose is what meets centroids; sums of centroids times it are vectors.
    """
    rotation = torch.nn.functional.pad(constants.rotation(spec, spec.seed, device), (0, 0, 0, 1))
    return rotation[torch.from_numpy(channel_of_column(spec)).to(device)]


@constants.cached_constant
def table(spec: QuantSpec, permute: bool, half: bool, device: torch.device) -> torch.Tensor:
    """Return the centroids, fp16 or float32; for permutes their bytes in four int32 registers."""
    centroids = codebook_of(spec).centroids
    if not permute:
        return torch.from_numpy(centroids.astype(np.float16 if half else np.float32)).to(device)
    entries = np.zeros(8, np.float16)
    known = centroids[8:] if spec.code_bits == MAX_PERMUTE_BITS else centroids
    entries[: len(known)] = known
    registers = np.ascontiguousarray(entries.view(np.uint8).reshape(8, 2).T[::-1])
    return torch.from_numpy(registers.view(np.int32).flatten().copy()).to(device)


@lru_cache
def program(bits: int) -> tuple[str, str]:
    """Return PTX and constraints of a lookup: two registers (four fp16) per part.

    Inputs are a word of the base plane; with 3 bits also one of the 1-bit plane and one whose bytes
    are 255 in the upper half of the columns; then the table: high bytes, low bytes. A scalar
    argument of a packed call is passed once per element.
    """
    words = _NIBBLE_WORDS[bits]
    outputs = 4 * words
    word = f"${outputs}"
    tables = [f"${outputs + (3 if bits == 3 else 1) + 4 * i}" for i in range(4)]
    lines = [".reg .b32 w, x, y, z, b, m, s, hi, lo;"]
    if bits == 3:  # fields of odd number move down; what a shift carries over is masked away
        lines.append(f"shr.u32 b, ${outputs + 1}, 1;")
        lines.append(f"lop3.b32 b, b, ${outputs + 1}, ${outputs + 2}, 0xE4;")  # c ? a : b
    for i in range(words):
        if bits == 4:
            lines += _signed(word)
            parts = (0, 1)
        else:
            lines += _nibbles(bits, i, word)
            lines += [
                "shr.u32 x, w, 4; shl.b32 z, w, 4;",
                "prmt.b32 y, z, w, 0x7531; prmt.b32 x, w, x, 0x6420;",
                "lop3.b32 z, x, y, 0x0F0F0F0F, 0xE4;",  # nibbles 0, 2 | 1, 3 of x, y
            ]
            parts = (i, i + words)
        for half, part in enumerate(parts):
            lines += _lookup(bits, half, part, tables)
    inputs = (3 if bits == 3 else 1) + 4 * len(tables)
    constraints = ",".join(["=&r"] * outputs + ["r"] * inputs)
    return "\n".join(["{", *lines, "}"]), constraints


def _nibbles(bits: int, index: int, word: str) -> list[str]:
    """Return PTX of nibble word w: low nibbles of part `index`, high ones half the parts on."""
    step = 1 if bits == 1 else 2
    lines = [f"shr.u32 w, {word}, {step * index}; and.b32 w, w, {_FIELDS[bits]:#x};"]
    if bits == 3:
        lines.append("shl.b32 x, b, 2;" if index == 0 else "mov.b32 x, b;")
        lines.append("lop3.b32 w, w, x, 0x44444444, 0xF8;")  # w | x & c
    return lines


def _signed(word: str) -> list[str]:
    """Return PTX that makes nibble word z of four bytes, and the magnitudes m of its codes.

        z    c0 c2 d0 d2 c1 c3 d1 d3        from the lowest; c = lows, d = highs of the bytes
        m    c & 7 of a code c >= 8, else 7 - c

    One shift of z brings the sign bits of two neighbours to the tops of two fp16.
    """
    return [
        f"shr.u32 x, {word}, 4; shl.b32 y, {word}, 4;",
        f"prmt.b32 x, {word}, x, 0x5140; prmt.b32 y, y, {word}, 0x7362;",
        "lop3.b32 z, x, y, 0x0F0F0F0F, 0xE4;",
        "shr.u32 m, z, 3; and.b32 m, m, 0x11111111; mul.lo.u32 m, m, 7;",
        "lop3.b32 m, z, m, 0x77777777, 0x82;",  # (z ^ ~m) & c
    ]


def _lookup(bits: int, half: int, part: int, tables: list[str]) -> list[str]:
    """Return PTX that looks up four nibbles: `half` of nibble word z, for outputs of `part`."""
    if bits == MAX_PERMUTE_BITS:
        selector = [f"prmt.b32 s, m, m, {0x20 + 0x11 * half:#x};"]
    else:
        selector = [f"shr.u32 s, z, {16 * half};"]
    lines = [
        *selector,
        f"prmt.b32 hi, {tables[0]}, {tables[1]}, s;",
        f"prmt.b32 lo, {tables[2]}, {tables[3]}, s;",
    ]
    for pair, (order, natural) in enumerate(((0x6240, 0x5140), (0x7351, 0x7362))):
        out = f"${2 * part + pair}"
        if bits != MAX_PERMUTE_BITS:
            lines.append(f"prmt.b32 {out}, lo, hi, {natural:#x};")
            continue
        lines.append(f"prmt.b32 {out}, lo, hi, {order:#x};")
        lines.append(f"shl.b32 s, z, {12 - 4 * (2 * half + pair)};")
        lines.append(f"lop3.b32 {out}, {out}, s, 0x80008000, 0xF2;")  # out | ~s & c
    return lines


@triton.jit
def load_registers(table_ptr, CODES: tl.constexpr):
    """Load the registers of a lookup by permutes, once per program."""
    if CODES.permute:
        values = (
            tl.load(table_ptr),
            tl.load(table_ptr + 1),
            tl.load(table_ptr + 2),
            tl.load(table_ptr + 3),
        )
    else:
        values = (0, 0, 0, 0)
    return values


@triton.jit
def _field(row, channel, mask, PLANES: tl.constexpr, INDEX: tl.constexpr):
    """Return the bits of codes that another plane than the base holds, in their place."""
    WIDTH: tl.constexpr = PLANES[INDEX][0]
    SHIFT: tl.constexpr = PLANES[INDEX][1]
    OFFSET: tl.constexpr = PLANES[INDEX][2]
    STRIDE: tl.constexpr = PLANES[INDEX][3]
    byte = tl.load(row + OFFSET + channel % STRIDE, mask=mask, other=0).to(tl.int32)
    return ((byte >> (channel // STRIDE * WIDTH)) & ((1 << WIDTH) - 1)) << SHIFT


@triton.jit
def centroids_of(row, live, columns, table_ptr, registers, CODES: tl.constexpr):
    """Return a tuple of `CODES.parts` tiles of centroids, in the dtype of the table.

    `row` (addresses), `live` and `columns` (0 .. CODES.columns - 1) broadcast to a tile, in either
    orientation. Where nothing is loaded the result is some finite centroid.
    """
    PARTS: tl.constexpr = CODES.parts
    PLANES: tl.constexpr = CODES.planes
    COUNT: tl.constexpr = len(PLANES)
    WIDTH: tl.constexpr = PLANES[0][0]
    STRIDE: tl.constexpr = CODES.stride
    inside = live & (columns < STRIDE)
    base = tl.load(row + columns, mask=inside, other=0)
    values = ()
    if CODES.permute:
        if CODES.bits == 3:
            P: tl.constexpr = PLANES[1][3]
            ones = tl.load(row + PLANES[1][2] + columns % P, mask=inside, other=0)
            upper = (tl.where(columns >= P, 255, 0) + base * 0).to(tl.uint8)
            inputs = (base, ones, upper)
        else:
            inputs = (base,)
        values = tl.inline_asm_elementwise(
            CODES.text, CODES.constraints, inputs + registers, (tl.float16,) * PARTS, True, 4
        )
    else:
        base = base.to(tl.int32)
        for part in tl.static_range(PARTS):
            code = (base >> (WIDTH * part)) & ((1 << WIDTH) - 1)
            for i in tl.static_range(1, COUNT):
                code |= _field(row, columns + part * STRIDE, inside, PLANES, i)
            values = values + (tl.load(table_ptr + code),)
    return values
