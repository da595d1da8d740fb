"""Packed bytes to operands of tensor cores, in registers.

A matrix product adds up channels in any order, so rows are never unpacked into channel order.
Codes stay where the lookup leaves them, and the *query* is stored in that order, once per call
(`Layout.position`). A tile of bytes of a row becomes `parts` operands, one value per byte each:

    byte of the base plane   j = 4 g + b        a 32-bit word g holds 32 / width codes
    operand p, column j      p, j -> channel    `position[channel] = p * padded + j`

There are two ways to look up the centroid of a code:

    "table"    codes are cut out byte by byte, centroids gathered from a table in memory (it stays
               in L1): any bits, any dim, any GPU, fp16 or fp32 operands
    "permute"  1-4 bits on NVIDIA: eight codes of a word are eight nibbles, and `prmt` uses four
               nibbles at a time as selectors into a table of eight bytes in two registers

With "permute" a word first becomes nibble words (w: bytes of the plane, v: of the 1-bit plane):

    4 bits   w                                            8 codes: dim j and j + dim / 2 of 4 bytes
    3 bits   w & 0x3333.. | v << 2 & 0x4444.. ...         4 words of 8 codes from 4 + 4 + 4 bytes
    2 bits   w & 0x3333..,  w >> 2 & 0x3333..             2 words of 8 codes
    1 bit    w >> i & 0x1111..                            4 words of 8 codes

and a nibble word two operands ("half 0": its low 16 bits). Values come in two forms:

    int8   digits of fixed-point centroids, most significant first; every sum is exact. With 4 bits
           the table has 16 entries: a nibble with its top bit set makes `prmt` repeat the sign bit
           of the byte, 0 for a digit < 128, so one lookup yields negative centroids and zeros, and
           one of the flipped word positive centroids and zeros; their sums are subtracted.
    fp16   high and low bytes looked up apart, then interleaved; 4 bits: magnitudes, and the sign
           put in afterwards.

Issued instructions (of them on the ALU, which runs at half rate) per code, sm_90, loop of the
SASS that Triton 3.6 makes, with loads and IMMAs; fp16: counted in the program, without the MMAs:

    bits                4            3            2            1
    int8, 2 digits      1.8 (1.4)    1.2 (1.0)    1.0 (0.8)    0.9 (0.6), 1 digit
    fp16                2.6 (2.1)    1.5 (1.5)    1.3 (1.3)    1.4 (1.4)

At 4 bits an H200 at its read ceiling has 3.3 (1.65) for a code.

A program sees four bytes that are adjacent in a row: `inline_asm_elementwise` packs what is
adjacent in the registers of a lane, and a lane loads at least four adjacent bytes. Triton does not
promise that; the GPU tests of every bits, dim and alignment would tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.packing import planes
from quantforge.ops import constants
from quantforge.ops.launch import INTERPRET
from quantforge.spec import QuantSpec

Form = Literal["int8", "fp16", "table"]
MAX_PERMUTE_BITS = 4
_NIBBLE_WORDS = {1: 4, 2: 2, 3: 4, 4: 1}
_PERMUTE_PLANE = {1: 0, 2: 0, 3: 1, 4: 0}
"""The plane whose bytes are counted by the columns of an operand."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the channels of a row are in the operands that a kernel decodes it to.

    Attributes:
        form: "int8", "fp16" (both by permutes) or "table".
        parts: operands per tile of bytes.
        stride: bytes of a row that columns stand for.
        tile: bytes per tile.
        position: (dim,) place of each channel among `parts * padded` columns.
    """

    form: Form
    parts: int
    stride: int
    tile: int
    position: NDArray[np.int32]

    @property
    def padded(self) -> int:
        """Columns per operand: the stride up to full tiles."""
        return -(-self.stride // self.tile) * self.tile

    @property
    def width(self) -> int:
        """Columns of all operands."""
        return self.parts * self.padded


def permutes(spec: QuantSpec) -> str | None:
    """Return why the codes of a spec cannot be looked up by permutes, or None."""
    if spec.code_bits > MAX_PERMUTE_BITS:
        return f"codes of {spec.code_bits} bits are not nibbles"
    if spec.dim % 8 or planes(spec.dim, spec.code_bits)[-1].stride % 4:
        return f"fields of dim {spec.dim} do not fill 32-bit words"
    return None


@lru_cache(maxsize=256)
def layout_of(spec: QuantSpec, form: Form) -> Layout:
    """Return the layout of a spec in one of the forms; `permutes(spec)` must allow it."""
    layout = planes(spec.dim, spec.code_bits)
    if form == "table":
        stride = layout[0].stride
        tile = min(64, max(16, triton.next_power_of_2(stride)))
        channel = np.arange(spec.dim)
        padded = -(-stride // tile) * tile
        position = channel // stride * padded + channel % stride
        return Layout(form, layout[0].fields, stride, tile, position.astype(np.int32))
    stride = layout[_PERMUTE_PLANE[spec.code_bits]].stride
    # 16 bytes a lane; fp16 operands of both halves of so many would not fit into the registers
    wide = form == "int8" and (stride % 64 == 0 or stride >= 320)
    tile = 64 if wide else 32
    padded = -(-stride // tile) * tile
    word, nibble, byte = _nibbles(spec.dim, spec.code_bits, stride)
    place = 2 * (byte % 4) + nibble  # of the code in its nibble word
    half, lane = place // 4, place % 4
    if form == "fp16" and spec.code_bits == 4:  # pairs are (e, e + 4), see `half_program`
        half, lane = place % 4 // 2, 2 * (place % 2) + place // 4
    column = byte // 4 * 4 + lane
    if form == "fp16":  # see `products._spread_half`: columns are in the order of the operand
        lane_bytes = tile // 4
        thread, inner = column % tile // lane_bytes, column % lane_bytes
        place = (inner // 2 * 4 + thread) * 2 + inner % 2
        column = column // tile * tile + place
    position = (2 * word + half) * padded + column
    parts = 2 * _NIBBLE_WORDS[spec.code_bits]
    return Layout(form, parts, stride, tile, position.astype(np.int32))


def _nibbles(dim: int, bits: int, stride: int) -> tuple[NDArray, NDArray, NDArray]:
    """Return nibble word, nibble (0 low, 1 high) and byte of each channel."""
    channel = np.arange(dim)
    if bits == 3:  # words A0 A1 B0 B1: A from the first half of the 2-bit plane, B the second
        byte, field = channel % (2 * stride), channel // (2 * stride)
        return 2 * (byte // stride) + field % 2, field // 2, byte % stride
    byte, field = channel % stride, channel // stride
    words = _NIBBLE_WORDS[bits]
    return field % words, field // words, byte


@constants.cached_constant
def position(spec: QuantSpec, form: Form, device: torch.device) -> torch.Tensor:
    """Return `Layout.position` on a device."""
    return torch.from_numpy(layout_of(spec, form).position).to(device)


def _unit_of_one_digit(centroids: NDArray[np.float64]) -> float:
    """Return the unit in which centroids, rounded to int8, err least.

    Numbers are about normal, so centroids weigh as the density there over its cube root, which is
    how close centroids are (Panter and Dite).
    """
    weights = np.exp(-(centroids**2) / 3)
    units = centroids.max() / np.linspace(64, 127.4, 8192)[:, None]
    errors = (np.rint(centroids / units) * units - centroids) ** 2 @ weights
    return float(units[np.argmin(errors), 0])


@lru_cache(maxsize=256)
def digits_of(spec: QuantSpec, digits: int) -> tuple[NDArray[np.int64], float]:
    """Return centroids as digits, (sets, digits, 8), and the unit of the last digit.

    1-3 bits have one set, signed digits of base 256; 4 bits the magnitudes of codes 8-15, digits
    of base 128 below 128, and those of codes 0-7.
    """
    centroids = codebook_of(spec).centroids.astype(np.float64)
    base = digit_base(spec)
    if spec.code_bits == MAX_PERMUTE_BITS:
        unit = centroids.max() / (base**digits - 1)
        if digits == 1:
            unit = _unit_of_one_digit(centroids)
        rest = np.stack([np.rint(centroids[8:] / unit), np.rint(-centroids[:8] / unit)])
        low = 0
    else:
        unit = centroids.max() / (127 * base ** (digits - 1))
        if digits == 1:
            unit = _unit_of_one_digit(centroids)
        padded = np.concatenate([centroids, np.zeros(8 - len(centroids))])
        rest, low = np.rint(padded / unit)[None], base // 2
    rest, result = rest.astype(np.int64), []
    for _ in range(digits - 1):
        digit = (rest + low) % base - low
        result.append(digit)
        rest = (rest - digit) // base
    return np.stack([rest, *reversed(result)], axis=1), unit


def digit_base(spec: QuantSpec) -> int:
    """Return the base of the digits of int8 centroids."""
    return 128 if spec.code_bits == MAX_PERMUTE_BITS else 256


def digit_sets(spec: QuantSpec) -> int:
    """Return the tables per digit: 4 bits have one for each sign."""
    return 2 if spec.code_bits == MAX_PERMUTE_BITS else 1


@constants.cached_constant
def tables(spec: QuantSpec, form: Form, digits: int, device: torch.device) -> torch.Tensor:
    """Return what a kernel looks values up in.

    "table": the float32 centroids. "int8", "fp16": registers of four bytes as int32, two per
    table; the interpreter, which has no `prmt`, gets a row of 16 float32 values per operand kind.
    """
    centroids = codebook_of(spec).centroids
    if form == "table":
        return torch.from_numpy(centroids).to(device)
    if form == "int8":
        values = digits_of(spec, digits)[0].swapaxes(0, 1)  # (digits, sets, 8)
        if INTERPRET:
            return torch.from_numpy(_sixteen(values)).to(device)
        entries = values.reshape(-1, 8).astype(np.int8).view(np.uint8)
    else:
        half = np.zeros(8, np.float16)
        positive = centroids[8:] if spec.code_bits == MAX_PERMUTE_BITS else centroids
        half[: len(positive)] = positive
        entries = half.view(np.uint8).reshape(8, 2).T[::-1]  # high bytes, then low bytes
    registers = np.ascontiguousarray(entries).view(np.int32).flatten()
    return torch.from_numpy(registers.copy()).to(device)


def _sixteen(values: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return per digit and set what each of 16 nibbles looks up: (digits, sets, 16)."""
    zero = np.zeros_like(values[:, 0])
    if values.shape[1] == 1:
        return np.concatenate([values, values], axis=-1).astype(np.int32)
    positive = np.concatenate([zero, values[:, 0]], axis=-1)
    negative = np.concatenate([values[:, 1], zero], axis=-1)
    return np.stack([positive, negative], axis=1).astype(np.int32)


@dataclass(frozen=True)
class Program:
    """Inline PTX that decodes four bytes of each input.

    Attributes:
        text: the instructions; `$i` are outputs, then inputs, then table registers (4 times each,
            since a scalar argument of a packed call is passed once per element).
        constraints: register classes.
        outputs: number of outputs.
        registers: number of table registers.
    """

    text: str
    constraints: str
    outputs: int
    registers: int


NO_PROGRAM = Program("", "", 0, 0)


def plane_fields(spec: QuantSpec) -> tuple[tuple[int, int, int, int], ...]:
    """Return width, shift, offset and stride of the planes, for lookups in a table."""
    return tuple((p.width, p.shift, p.offset, p.stride) for p in planes(spec.dim, spec.code_bits))


def _nibble_program(bits: int, first: int) -> list[str]:
    """Return PTX that makes nibble words n0, n1, ... of input operands from `first` on."""
    w = f"${first}"
    if bits == 4:
        return [".reg .b32 n0;", f"mov.b32 n0, {w};"]
    if bits == 2:
        return [
            ".reg .b32 n<2>;",
            f"and.b32 n0, {w}, 0x33333333;",
            f"shr.u32 n1, {w}, 2; and.b32 n1, n1, 0x33333333;",
        ]
    if bits == 1:
        words = [f"shr.u32 n{i}, {w}, {i}; and.b32 n{i}, n{i}, 0x11111111;" for i in range(4)]
        return [".reg .b32 n<4>;", *words]
    a, b = f"${first + 1}", f"${first + 2}"  # w is the 1-bit plane
    lines = [".reg .b32 n<4>, t, u;"]
    moves = (
        f"shl.b32 u, {w}, 2;",
        f"mov.b32 u, {w};",
        f"shl.b32 u, {w}, 1;",
        f"shr.u32 u, {w}, 1;",
    )
    for i, (source, move) in enumerate(zip((a, a, b, b), moves, strict=True)):
        lines.append(f"shr.u32 t, {source}, {2 * (i % 2)}; {move}")
        # t & 0x33333333 | u & 0x44444444
        lines.append(f"and.b32 u, u, 0x44444444; lop3.b32 n{i}, t, 0x33333333, u, 0xEA;")
    return lines


def _program(bits: int, lines: list[str], outputs: int, per_output: int, registers: int) -> Program:
    inputs = 3 if bits == 3 else 1
    constraints = ["=r"] * (outputs * per_output) + ["r"] * (inputs + 4 * registers)
    return Program("\n".join(["{", *lines, "}"]), ",".join(constraints), outputs, registers)


@lru_cache
def int_program(bits: int, digits: int) -> Program:
    """Return the lookup of int8 digits: outputs ordered by digit, set, nibble word, half."""
    sets, words = (2 if bits == MAX_PERMUTE_BITS else 1), _NIBBLE_WORDS[bits]
    outputs = digits * sets * words * 2
    lines = _nibble_program(bits, outputs)
    first = outputs + (3 if bits == 3 else 1)
    lines.append(f".reg .b32 h<{words}>, x, y;")
    lines += [f"shr.u32 h{i}, n{i}, 16;" for i in range(words)]
    if sets == 2:
        lines.append("xor.b32 x, n0, 0x88888888; shr.u32 y, x, 16;")
    out = 0
    for table in range(digits * sets):
        low, high = (f"${first + 4 * (2 * table + i)}" for i in range(2))
        flipped = sets == 2 and table % 2 == 0  # positive centroids have the top bit set
        for i in range(words):
            for selector in ("x", "y") if flipped else (f"n{i}", f"h{i}"):
                lines.append(f"prmt.b32 ${out}, {low}, {high}, {selector};")
                out += 1
    return _program(bits, lines, outputs, 1, 2 * digits * sets)


@lru_cache
def half_program(bits: int) -> Program:
    """Return the lookup of fp16 centroids: outputs ordered by nibble word, half."""
    words = _NIBBLE_WORDS[bits]
    operands = 4 * words  # each output of four fp16 is two registers
    lines = _nibble_program(bits, operands)
    first = operands + (3 if bits == 3 else 1)
    high, low = (tuple(f"${first + 4 * (i + j)}" for j in range(2)) for i in (0, 2))
    lines.append(".reg .b32 s, m, hi, lo;")
    if bits == MAX_PERMUTE_BITS:
        # magnitude of code c: c & 7 if c >= 8, else 7 - c; then pairs (e, e + 4), whose sign bits
        # are 16 apart, so that one shift brings both to the tops of the two fp16
        lines.append("shr.u32 m, n0, 3; and.b32 m, m, 0x11111111; mul.lo.u32 m, m, 7;")
        lines.append("lop3.b32 m, n0, m, 0x77777777, 0x82;")  # (n0 ^ ~m) & 0x77777777
        for half in range(2):
            lines.append(f"prmt.b32 s, m, m, {0x20 + 0x11 * half:#x};")
            lines.append(f"prmt.b32 hi, {high[0]}, {high[1]}, s;")
            lines.append(f"prmt.b32 lo, {low[0]}, {low[1]}, s;")
            for pair in range(2):
                out = f"${2 * half + pair}"
                lines.append(f"prmt.b32 {out}, lo, hi, {0x6240 + 0x1111 * pair:#x};")
                lines.append(f"shl.b32 s, n0, {12 - 4 * (2 * half + pair)};")
                lines.append(f"lop3.b32 {out}, {out}, s, 0x80008000, 0xF2;")  # out | ~s & c
        return _program(bits, lines, 2, 2, 4)
    for i in range(words):
        for half in range(2):
            lines.append(f"shr.u32 s, n{i}, {16 * half};")
            lines.append(f"prmt.b32 hi, {high[0]}, {high[1]}, s;")
            lines.append(f"prmt.b32 lo, {low[0]}, {low[1]}, s;")
            for pair, selector in enumerate(("0x5140", "0x7362")):
                lines.append(f"prmt.b32 ${4 * i + 2 * half + pair}, lo, hi, {selector};")
    return _program(bits, lines, 2 * words, 2, 4)
