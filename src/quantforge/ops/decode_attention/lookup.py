"""PTX that turns packed words into tensor-core operands: the lookup of `numerics.pages`.

`prmt` picks four bytes out of eight by four selectors of a nibble each. Two ways to fp16:

    e4m3     one table of bytes, `prmt`, then a conversion of two bytes at a time (exact)
    others   a table of low bytes and one of high bytes, two `prmt`, two more to interleave them

Instructions of the half-rate pipe for 8 codes (on Hopper `prmt`, `lop3`, right shifts and
conversions take a warp every second cycle; left shifts and the step to a word's upper half do not):

             mask  shift  lookup  sign  interleave or convert    total
    4 bits   1            2 / 4   2     4                        9 e4m3, 11
    3 bits   2     1      2 / 4         4                        9 e4m3, 11
    2 bits   1     .5     2 / 4         4                        7.5 e4m3, 9.5
"""

from __future__ import annotations

from functools import lru_cache

TABLE_WORDS = 4
"""Words of a lookup table: low bytes of entries 0-3 and 4-7, then their high bytes (or e4m3)."""

_SCRATCH = "{\n .reg .b32 t, z, l, h, u, v, n; .reg .b16 a, b;\n"

_UPPER = (
    " mov.b32 {a, b}, z;\n mov.b32 u, {b, b};\n mov.b32 n, 0x80008000;\n add.rn.f16x2 u, u, n;\n"
)
"""The upper half of the selectors z, for `prmt`, which reads the lower half of a register.

Selectors have no bit 3 in a nibble, so as fp16 they are finite and positive, and adding -0 leaves
them as they are: an addition that reads a half twice costs a slot of the full-rate pipe, a right
shift one of the half-rate pipe that everything else here needs.
"""


def _lookup(selector: str, table: list[str], outputs: tuple[int, int], e4m3: bool) -> str:
    first, second = outputs
    if e4m3:
        return f" prmt.b32 h, {table[2]}, {table[3]}, {selector};\n" + _convert(first, second)
    return (
        f" prmt.b32 l, {table[0]}, {table[1]}, {selector};\n"
        f" prmt.b32 h, {table[2]}, {table[3]}, {selector};\n" + _interleave(first, second)
    )


def _convert(first: int, second: int) -> str:
    return (
        " mov.b32 {a, b}, h;\n"
        f" cvt.rn.f16x2.e4m3x2 ${first}, a;\n"
        f" cvt.rn.f16x2.e4m3x2 ${second}, b;\n"
    )


def _interleave(first: int, second: int) -> str:
    return f" prmt.b32 ${first}, l, h, 0x5140;\n prmt.b32 ${second}, l, h, 0x7362;\n"


def _table(first_operand: int) -> list[str]:
    """Return operands of the four table words; an int32 takes four operands beside bytes."""
    return [f"${first_operand + 4 * word}" for word in range(TABLE_WORDS)]


def _four_bits(e4m3: bool) -> str:
    table = _table(5)
    text = " and.b32 z, $4, 0x77777777;\n" + _UPPER + " shl.b32 v, $4, 4;\n"
    for selector, signs, outputs in (("z", "$4", (0, 1)), ("u", "v", (2, 3))):
        if not e4m3:
            text += f" prmt.b32 l, {table[0]}, {table[1]}, {selector};\n"
        text += f" prmt.b32 h, {table[2]}, {table[3]}, {selector};\n"
        text += f" lop3.b32 h, h, {signs}, 0x80808080, 0xF8;\n"  # h | (signs & mask)
        text += _convert(*outputs) if e4m3 else _interleave(*outputs)
    return text


def _three_bits(e4m3: bool) -> str:
    table, text = _table(10), ""
    for pair in range(2):
        if pair == 0:
            text += " shl.b32 t, $9, 2;\n and.b32 t, t, 0x44444444;\n"
            text += " lop3.b32 z, $8, 0x33333333, t, 0xEA;\n"  # (word & mask) | t
        else:
            text += " and.b32 t, $9, 0x44444444;\n shr.b32 z, $8, 2;\n"
            text += " lop3.b32 z, z, 0x33333333, t, 0xEA;\n"
        text += _lookup("z", table, (4 * pair, 4 * pair + 1), e4m3)
        text += _UPPER
        text += _lookup("u", table, (4 * pair + 2, 4 * pair + 3), e4m3)
    return text


def _two_bits(e4m3: bool) -> str:
    table = _table(9)
    table[1], table[3] = table[0], table[2]  # four entries
    text = ""
    for pair in range(2):
        if pair:
            text += " shr.b32 t, $8, 2;\n"
        text += f" and.b32 z, {'t' if pair else '$8'}, 0x33333333;\n"
        text += _lookup("z", table, (4 * pair, 4 * pair + 1), e4m3)
        text += _UPPER
        text += _lookup("u", table, (4 * pair + 2, 4 * pair + 3), e4m3)
    return text


@lru_cache
def lookup(bits: int, e4m3: bool) -> tuple[str, str]:
    """Return PTX and constraints of the lookup of codes of 2, 3 or 4 bits."""
    body = {2: _two_bits, 3: _three_bits, 4: _four_bits}[bits](e4m3)
    outputs = 4 if bits == 4 else 8
    inputs = (2 if bits == 3 else 1) + 4 * TABLE_WORDS
    constraints = ",".join(["=r"] * outputs + ["r"] * inputs)
    return _SCRATCH + body + "}\n", constraints


LOAD_BY_LANE = """
{
 .reg .b32 lane; .reg .b64 address;
 mov.u32 lane, %laneid;
 mad.wide.u32 address, lane, 4, $1;
 ld.global.b32 $0, [address];
}
"""
"""Load a word by lane: a table that the compiler knows to be uniform is copied before each use."""

HALVE = "shr.b32 $0, $1, 1;"
