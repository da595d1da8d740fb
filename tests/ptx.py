"""A machine for straight-line PTX on words of 32 bits: inline assembly tested without a GPU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
_ALL = np.uint64(0xFFFFFFFF)


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    result = np.zeros_like(a)
    for row in range(8):
        if int(table) >> row & 1:
            factors = (x if row & bit else ~x for bit, x in ((4, a), (2, b), (1, c)))
            result = result | np.bitwise_and.reduce(np.broadcast_arrays(*factors))
    return result


def _prmt(a: Words, b: Words, selectors: Words) -> Words:
    pair, result = a | b << np.uint64(32), np.zeros_like(a)
    for i in range(4):
        selector = selectors >> np.uint64(4 * i) & np.uint64(15)
        byte = pair >> np.uint64(8) * (selector & np.uint64(7)) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), 255, 0).astype(np.uint64)
        result = result | np.where(selector >> np.uint64(3), sign, byte) << np.uint64(8 * i)
    return result


_INSTRUCTIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "shr": lambda a, b: a >> b,
    "shl": lambda a, b: a << b,
    "mul": lambda a, b: a * b,
    "lop3": _lop3,
    "prmt": _prmt,
}


def run(text: str, operands: dict[str, Words]) -> dict[str, Words]:
    """Run a program on operands `$i` and return all registers."""
    registers = dict(operands)
    for statement in text.strip("{}\n").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        values = [registers[s] if s in registers else np.uint64(int(s, 0)) for s in sources]
        registers[target] = _INSTRUCTIONS[name.partition(".")[0]](*values) & _ALL
    return registers
