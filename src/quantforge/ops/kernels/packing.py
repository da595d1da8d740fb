"""Codes to bytes and back: the planes of `numerics.packing`, in a tile of rows.

A vector is `odd * 2^k` channels in a tile of `2^j` columns. A plane of width w puts a channel and
those `odd * 2^k * w / 8` bytes away into one byte, so the tile is cut into chunks of that size over
`odd`, and chunk t goes to slot `t // odd` of byte chunk `t % odd`:

    odd = 3, w = 4     [ 0 | 1 | 2 | 3 | 4 | 5 ]  ->  bytes [ 0 + 3<<4 | 1 + 4<<4 | 2 + 5<<4 ]

WORDS tells that rows are multiples of 4 bytes where they are not of 16, which the compiler finds
out by itself. (A hint belongs to the operation that makes the pointers: it has no effect on an
argument of a function.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.layouts import column_axis, columns


@triton.jit
def chunks(x, ROWS: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr):
    """Return COUNT (a power of two) tensors (ROWS, N / COUNT), the columns of x in order."""
    parts = (x,)
    for level in tl.static_range(8):
        if (1 << level) < COUNT:
            halves = ()
            for i in tl.static_range(1 << level):
                pair = tl.reshape(parts[i], (ROWS, 2, (N >> level) // 2))
                low, high = tl.split(tl.permute(pair, (0, 2, 1)))
                halves = halves + (low, high)
            parts = halves
    return parts


@triton.jit
def store_plane(
    codes,
    row_pointers,
    mask,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    ODD: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    IS_TOP: tl.constexpr,
    WORDS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Store one plane of codes (ROWS, N), of which DIM columns count; a top one has no bits above.

    `row_pointers` and `mask` are columns (ROWS, 1). Bytes past the data, up to a multiple of 4,
    become zeros. Instructions per element: 1-2.
    """
    SLOTS: tl.constexpr = 8 // WIDTH
    COUNT: tl.constexpr = N * ODD // DIM * SLOTS
    STRIDE: tl.constexpr = DIM * WIDTH // 8
    field = codes >> SHIFT
    if not IS_TOP:
        field = field & ((1 << WIDTH) - 1)
    fields = chunks(field, ROWS, N, COUNT)
    pointers = columns(row_pointers, N // COUNT, LAYOUT)
    pointers = pointers + column_axis(N // COUNT, LAYOUT)
    if WORDS and N // COUNT >= 4:
        pointers = tl.multiple_of(pointers, (1, 4))
    wanted = columns(mask, N // COUNT, LAYOUT)
    for chunk in tl.static_range(ODD):
        total = fields[chunk]
        for slot in tl.static_range(1, SLOTS):
            total = total + (fields[slot * ODD + chunk] << (slot * WIDTH))  # one instruction
        packed = columns(total.to(tl.uint8), N // COUNT, LAYOUT)
        tl.store(pointers + chunk * (N // COUNT), packed, mask=wanted)
    for byte in tl.static_range(STRIDE, (STRIDE + 3) // 4 * 4):
        tl.store(row_pointers + byte, 0, mask=mask)


@triton.jit
def store_codes(
    codes,
    row_pointers,
    mask,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    ODD: tl.constexpr,
    PLANES: tl.constexpr,
    WORDS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Store codes (ROWS, N) as the planes (width, shift, offset) that PLANES lists."""
    for plane in tl.static_range(len(PLANES)):
        store_plane(
            codes, row_pointers + PLANES[plane][2], mask,
            ROWS, N, DIM, ODD, PLANES[plane][0], PLANES[plane][1], plane + 1 == len(PLANES),
            WORDS, LAYOUT,
        )  # fmt: skip


@triton.jit
def joined(parts, ROWS: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr):
    """Invert `chunks`: COUNT tensors (ROWS, N / COUNT) to the columns of one (ROWS, N)."""
    for level in tl.static_range(8):
        if (COUNT >> level) > 1:
            pairs = ()
            for i in tl.static_range((COUNT >> level) // 2):
                pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (0, 2, 1))
                pairs = pairs + (tl.reshape(pair, (ROWS, (N // COUNT) << (level + 1))),)
            parts = pairs
    return parts[0]


@triton.jit
def load_codes(
    row_pointers, byte_stride, mask,
    ROWS: tl.constexpr, N: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return codes (ROWS, N), int32, of vectors whose length is a power of two.

    `row_pointers` and `mask` are columns (ROWS, 1). Instructions per element: 1-2 for each plane.
    """
    for plane in tl.static_range(len(PLANES)):
        bytes_ = columns(row_pointers, N * PLANES[plane][0] // 8, LAYOUT)
        column = column_axis(N * PLANES[plane][0] // 8, LAYOUT) + PLANES[plane][2]
        wanted = columns(mask, N * PLANES[plane][0] // 8, LAYOUT)
        pointers = bytes_ + column.to(tl.int64) * byte_stride
        if WORDS and N * PLANES[plane][0] >= 32:
            pointers = tl.multiple_of(pointers, (1, 4))
        data = tl.load(pointers, mask=wanted, other=0)
        data = data.to(tl.int32)
        fields = ()
        for slot in tl.static_range(8 // PLANES[plane][0]):
            field = (data >> (slot * PLANES[plane][0])) & ((1 << PLANES[plane][0]) - 1)
            fields = fields + (field << PLANES[plane][1],)
        part = columns(joined(fields, ROWS, N, 8 // PLANES[plane][0]), N, LAYOUT)
        if plane == 0:
            codes = part
        else:
            codes = codes | part
    return codes
