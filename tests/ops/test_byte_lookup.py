"""The lookup of centroids by permutes, its assembly run word for word on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.packing import pack
from quantforge.spec import QuantSpec
from tests.helpers import spec_of
from tests.ptx import Words, run

byte_lookup = pytest.importorskip("quantforge.ops.kernels.byte_lookup")


def _inputs(rows: np.ndarray, codes) -> list[np.ndarray]:  # type: ignore[no-untyped-def]
    column = np.arange(codes.stride)
    base = rows[:, column]
    if codes.bits != 3:
        return [base]
    _, _, offset, stride = codes.planes[1]
    upper = np.where(column >= stride, 255, 0).astype(np.uint8)
    return [base, rows[:, offset + column % stride], np.broadcast_to(upper, base.shape)]


def _words(x: np.ndarray) -> Words:
    return np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)


@pytest.mark.parametrize("codebook", ["lloyd_max", "e4m3"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_program(dim: int, bits: int, codebook: str) -> None:
    """All pairs of codes in a byte, in all places of a word."""
    spec = QuantSpec(dim, bits, codebook=codebook)  # type: ignore[arg-type]
    layout = byte_lookup.codes_of(spec, 16, True)
    codes = np.random.RandomState(0).randint(0, 1 << bits, (2000, dim)).astype(np.uint8)
    inputs = _inputs(pack(codes, bits), layout)
    first = 2 * layout.parts
    operands = {f"${first + i}": _words(x) for i, x in enumerate(inputs)}
    table = byte_lookup.table(spec, True, True, torch.device("cpu")).numpy().view(np.uint32)
    for i, register in enumerate(table):
        for copy in range(4):
            operands[f"${first + len(inputs) + 4 * i + copy}"] = np.uint64(register)
    assert layout.constraints.count(",") + 1 == first + len(inputs) + 4 * len(table)
    registers = run(layout.text, operands)
    halves = [
        np.stack([registers[f"${2 * part + i}"] for i in range(2)], -1).astype(np.uint32)
        for part in range(layout.parts)
    ]
    got = np.concatenate([x.reshape(len(codes), -1).view(np.float16) for x in halves], 1)
    want = codebook_of(spec).centroids.astype(np.float16)[codes]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [1, 63, 64, 80, 100, 128])
def test_columns_hold_every_channel_once(dim: int, bits: int) -> None:
    channel = byte_lookup.channel_of_column(spec_of(dim, bits))
    np.testing.assert_array_equal(np.sort(channel[channel < dim]), np.arange(dim))
