"""The inline PTX that looks codes up, run by a small emulator: no GPU is needed to trust it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.packing import pack, planes
from quantforge.ops.kernels import decode
from quantforge.spec import QuantSpec
from tests.interpreter import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter has tables of another kind")

CPU = torch.device("cpu")
MASK = np.uint64(0xFFFFFFFF)
DIMS = {1: (128, 256, 768), 2: (64, 96, 768), 3: (96, 128, 768), 4: (64, 80, 96, 768, 1536)}
CASES = [(bits, dim) for bits, dims in DIMS.items() for dim in dims]


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a | (b << np.uint64(32))
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        result |= np.where(nibble >= 8, sign, byte) << np.uint64(8 * i)
    return result


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for i in range(8):
        if int(table.flat[0]) >> i & 1:
            terms = [x if i >> (2 - j) & 1 else x ^ MASK for j, x in enumerate((a, b, c))]
            result |= terms[0] & terms[1] & terms[2]
    return result


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: (a << b) & MASK,
    "mul.lo.u32": lambda a, b: (a * b) & MASK,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
}


def run(program: decode.Program, words: list[np.ndarray], table: list[int]) -> list[np.ndarray]:
    """Run a program on words of its inputs; returns its output registers."""
    outputs = program.constraints.count("=r")
    values = {f"${outputs + i}": word.astype(np.uint64) for i, word in enumerate(words)}
    for i, register in enumerate(table):
        whole = np.full_like(values[f"${outputs}"], register & 0xFFFFFFFF)
        values.update({f"${outputs + len(words) + 4 * i + j}": whole for j in range(4)})
    assert len(values) == program.constraints.count("r") - outputs, "a constraint per operand"
    for line in re.split(r"[;\n]", program.text.strip("{}")):
        operation, _, rest = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        arguments = [
            values[s] if s in values else np.full_like(values[f"${outputs}"], int(s, 0))
            for s in sources
        ]
        values[target] = OPERATIONS[operation](*arguments)
    return [values[f"${i}"] for i in range(outputs)]


def _inputs(spec: QuantSpec, row: np.ndarray, layout: decode.Layout) -> list[np.ndarray]:
    """Return the words of the planes that a kernel loads for one row, zeros past the end."""
    stride, all_planes = layout.stride, planes(spec.dim, spec.bits)
    starts = [0] if spec.bits != 3 else [all_planes[1].offset, 0, stride]
    result = []
    for start in starts:
        padded = np.zeros(layout.padded, np.uint8)
        padded[:stride] = row[start : start + stride]
        result.append(padded.view(np.uint32))
    return result


def _row(spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    codes = np.random.RandomState(spec.dim).randint(0, 1 << spec.bits, spec.dim).astype(np.uint8)
    return codes, pack(codes, spec.bits)


@pytest.mark.parametrize("digits", [1, 2, 3])
@pytest.mark.parametrize(("bits", "dim"), CASES)
def test_integer_program(bits: int, dim: int, digits: int) -> None:
    spec = QuantSpec(dim, bits)
    layout = decode.layout_of(spec, "int8")
    codes, row = _row(spec)
    program = decode.int_program(bits, digits)
    table = decode.tables(spec, "int8", digits, CPU).tolist()
    assert len(table) == program.registers
    words = run(program, _inputs(spec, row, layout), table)
    values = np.stack([w.astype(np.uint32).view(np.int8).astype(np.int64) for w in words])
    values = values.reshape(digits, decode.digit_sets(spec), layout.parts * layout.padded)
    signed = values[:, 0] - (values[:, 1] if values.shape[1] == 2 else 0)
    _, unit = decode.digits_of(spec, digits)
    fixed = np.zeros(layout.width, np.int64)
    for digit in signed:
        fixed = fixed * decode.digit_base(spec) + digit
    got = fixed[layout.position] * unit
    exact = codebook_of(spec).centroids.astype(np.float64)[codes]
    np.testing.assert_allclose(got, exact, atol=unit * 0.5001, rtol=1e-6)


@pytest.mark.parametrize(("bits", "dim"), CASES)
def test_half_program(bits: int, dim: int) -> None:
    spec = QuantSpec(dim, bits)
    layout = decode.layout_of(spec, "fp16")
    codes, row = _row(spec)
    program = decode.half_program(bits)
    table = decode.tables(spec, "fp16", 0, CPU).tolist()
    registers = run(program, _inputs(spec, row, layout), table)
    pairs = np.stack([r.astype(np.uint32) for r in registers])  # (2 * parts, words)
    values = pairs.reshape(layout.parts, 2, -1).transpose(0, 2, 1).copy().view(np.float16)
    values = values.reshape(layout.parts, -1, 4, layout.tile // 16, 2, 2)  # as `_spread_half`
    operand = values.transpose(0, 1, 3, 4, 2, 5).flatten()
    expected = codebook_of(spec).centroids.astype(np.float16)[codes]
    np.testing.assert_array_equal(operand[layout.position], expected)


@pytest.mark.parametrize("form", ["int8", "fp16", "table"])
@pytest.mark.parametrize(("bits", "dim"), CASES)
def test_every_channel_has_a_place_of_its_own(bits: int, dim: int, form: decode.Form) -> None:
    layout = decode.layout_of(QuantSpec(dim, bits), form)
    assert len(set(layout.position.tolist())) == dim
    assert layout.position.min() >= 0
    assert layout.position.max() < layout.width


def test_what_permutes_cannot_look_up() -> None:
    assert "5 bits" in str(decode.permutes(QuantSpec(64, 5)))
    assert "do not fill" in str(decode.permutes(QuantSpec(80, 3)))
    assert decode.permutes(QuantSpec(80, 4)) is None
