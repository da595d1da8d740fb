"""The page layout: every code has its bits somewhere, once, and where the lookup finds them."""

from __future__ import annotations

import numpy as np
import pytest

from quantforge.numerics.pages import (
    PAGE_BITS,
    PAGE_DIMS,
    bit_maps,
    pack_rows,
    page_layout,
    scale_order,
    symbols,
    token_order,
    unpack_rows,
    why_no_pages,
)
from quantforge.spec import QuantSpec

LENGTHS = [(bits, n) for bits in PAGE_BITS for n in (64, 128, 256) if bits == 4 or n >= 128]


def _codes(bits: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(bits).randint(0, 1 << bits, shape).astype(np.uint8)


@pytest.mark.parametrize(("bits", "length"), LENGTHS)
def test_each_bit_has_one_place(bits: int, length: int) -> None:
    pairs = np.concatenate(
        [np.stack([m.code.ravel(), m.bit.ravel()], -1) for m in bit_maps(length, bits)]
    )
    assert len(pairs) == length * bits == len(np.unique(pairs, axis=0))


@pytest.mark.parametrize(("bits", "length"), LENGTHS)
def test_round_trip(bits: int, length: int) -> None:
    codes = _codes(bits, 2, 5, length)
    data = pack_rows(codes, bits)
    assert data.shape == (2, 5 * length * bits // 8)
    np.testing.assert_array_equal(unpack_rows(data, 5, length, bits), codes)


def _lookup(words: np.ndarray, bits: int, high: np.ndarray | None) -> list[np.ndarray]:
    """Do what the PTX does: selectors of each part, four nibbles at a time."""
    if bits == 4:
        magnitude = words & 0x77777777
        signs = (words & 0x80808080, (words << 4) & 0x80808080)
        return [
            [
                ((magnitude >> (16 * part + 4 * i)) & 7) | (((signs[part] >> (8 * i + 7)) & 1) << 3)
                for i in range(4)
            ]
            for part in range(2)
        ]
    parts = []
    for pair in range(2):
        selectors = (words >> (2 * pair)) & 0x33333333
        if high is not None:
            selectors |= ((high << 2) if pair == 0 else high) & 0x44444444
        parts += [[(selectors >> (16 * half + 4 * i)) & 15 for i in range(4)] for half in range(2)]
    return parts


@pytest.mark.parametrize(("bits", "length"), LENGTHS)
def test_lookup_finds_every_code(bits: int, length: int) -> None:
    codes = _codes(bits, 1, length)
    data = pack_rows(codes, bits)
    plane = data[: length * (2 if bits == 3 else bits) // 8]
    words = plane.view(np.uint32).astype(np.uint64)
    high = None
    if bits == 3:
        plane1 = data[len(plane) :].view(np.uint32).astype(np.uint64)
        high = np.concatenate([plane1, plane1 >> np.uint64(1)])
    found = np.stack([np.stack(part, -1).ravel() for part in _lookup(words, bits, high)])
    np.testing.assert_array_equal(found.ravel(), symbols(bits)[codes[0]])


@pytest.mark.parametrize("tokens", [64, 128])
def test_orders_are_permutations(tokens: int) -> None:
    for order in (token_order(tokens), scale_order(tokens)):
        np.testing.assert_array_equal(np.sort(order), np.arange(tokens))


def test_page_size_and_bytes() -> None:
    four, two = QuantSpec(128, 4), QuantSpec(128, 2)
    assert page_layout(four, four).key_bytes == 64 * (64 + 2)
    mixed = page_layout(four, two)
    assert (mixed.tokens, mixed.key_bytes, mixed.value_bytes) == (128, 128 * 66, 128 * 34)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(128, 5),
        QuantSpec(96, 4),
        QuantSpec(128, 4, estimator="prod"),
        QuantSpec(128, 4, scale_dtype="float32"),
    ],
)
def test_what_has_no_pages_says_why(spec: QuantSpec) -> None:
    assert why_no_pages(QuantSpec(128, 4), spec)
    assert why_no_pages(spec, QuantSpec(128, 4))


def test_dims_with_pages() -> None:
    for bits, dims in PAGE_DIMS.items():
        for dim in dims:
            assert why_no_pages(QuantSpec(dim, bits), QuantSpec(dim, bits)) is None
