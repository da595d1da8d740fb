"""Bit planes: bytes made by hand, round trips, alignment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantforge.numerics.packing import pack, packed_width, planes, row_bytes, unpack
from quantforge.spec import QuantSpec

BITS = range(1, 9)


def _bytes(*values: int, length: int) -> list[int]:
    return [*values, *[0] * (length - len(values))]


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        # one byte holds channels 0..7, channel 0 in the lowest bit; padded to 4 bytes
        (1, [1, 0, 0, 1, 0, 0, 0, 1], _bytes(0b1000_1001, length=4)),
        # 16 channels make 2 bytes: channel j of byte j, its next one P = 2 further
        (1, [1, 0] + [0] * 13 + [1], _bytes(0b0000_0001, 0b1000_0000, length=4)),
        (2, [3, 0, 1, 2], _bytes(0b10_01_00_11, length=4)),
        (2, [3, 1, 2, 0, 1, 1, 0, 3], _bytes(0b00_01_10_11, 0b11_01_00_01, length=4)),
        # two bits of channel 0 at the bottom of the 2-bit plane, its third in the 1-bit plane
        (3, [5, 0, 0, 6], _bytes(0b10_00_00_01, 0, 0, 0, 0b0000_1001, length=8)),
        # halves of the vector in the low and the high nibble
        (4, [1, 2, 3, 4], _bytes(0x31, 0x42, length=4)),
        (5, [0x1F, 0x02, 0x10, 0x0A], _bytes(0x0F, 0xA2, 0, 0, 0b0101, length=8)),
        (6, [0x3F, 0x12], _bytes(0x2F, 0, 0, 0, 0b01_11, length=8)),
        (7, [0x7F, 0x41], _bytes(0x1F, 0, 0, 0, 0b00_11, 0, 0, 0, 0b11, length=12)),
        (8, [255, 0, 7], _bytes(255, 0, 7, length=4)),
        # odd dims: P = ceil(dim / k), the last fields of the last bytes stay zero
        (4, [1, 2, 3], _bytes(0x31, 0x02, length=4)),
        (2, [3, 1, 2, 0, 1], _bytes(0b00_01_10_11, 0b00_00_00_01, length=4)),
    ],
)
def test_bytes_by_hand(bits: int, codes: list[int], expected: list[int]) -> None:
    array = np.array(codes, np.uint8)
    assert pack(array, bits).tolist() == expected
    np.testing.assert_array_equal(unpack(np.array(expected, np.uint8), len(codes), bits), array)


@given(
    bits=st.integers(1, 8),
    shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=130),
    data=st.data(),
)
def test_round_trip(bits: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    shape = (*[min(n, 3) for n in shape[:-1]], shape[-1])
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    rows = pack(codes, bits)
    assert rows.shape == (*shape[:-1], row_bytes(shape[-1], bits))
    np.testing.assert_array_equal(unpack(rows, shape[-1], bits), codes)


@pytest.mark.parametrize("dim", [1, 2, 63, 64, 80, 96, 100, 127, 128, 1536])
@pytest.mark.parametrize("bits", BITS)
def test_layout(bits: int, dim: int) -> None:
    """Planes cover all bits once, start aligned, do not overlap, and waste under 4 bytes each."""
    layout = planes(dim, bits)
    assert sum(plane.width for plane in layout) == bits
    covered, end = 0, 0
    for plane in layout:
        assert plane.shift == covered
        assert plane.offset % 4 == 0
        assert 0 <= plane.offset - end < 4
        assert plane.stride == -(-dim * plane.width // 8)
        covered, end = covered + plane.width, plane.offset + plane.stride
    assert row_bytes(dim, bits) % 4 == 0
    assert 0 <= row_bytes(dim, bits) - end < 4


@pytest.mark.parametrize("bits", BITS)
def test_usual_dims_have_no_padding(bits: int) -> None:
    for dim in (128, 256, 384, 768, 1024, 1536, 3072, 4096):
        assert row_bytes(dim, bits) == dim * bits // 8
        assert row_bytes(dim, bits) % 16 == 0


@pytest.mark.parametrize("dim", [1, 63, 100, 127])
@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero_and_ignored(bits: int, dim: int) -> None:
    """All codes at their maximum set exactly dim * bits bits; what else is set is not read."""
    codes = np.full((2, dim), 2**bits - 1, np.uint8)
    rows = pack(codes, bits)
    assert np.unpackbits(rows, axis=-1).sum(-1).tolist() == [dim * bits] * 2
    np.testing.assert_array_equal(unpack(rows | ~rows, dim, bits), codes)


def test_codes_that_share_no_byte_do_not_interfere() -> None:
    for bits in BITS:
        for channel in range(20):
            codes = np.zeros(20, np.uint8)
            codes[channel] = 2**bits - 1
            np.testing.assert_array_equal(unpack(pack(codes, bits), 20, bits), codes)


def test_packed_width_counts_the_qjl_plane() -> None:
    assert packed_width(QuantSpec(128, 4)) == 64
    assert packed_width(QuantSpec(128, 4, estimator="prod")) == 48 + 16
    assert packed_width(QuantSpec(100, 3, rotation="qr", estimator="prod")) == 28 + 16
