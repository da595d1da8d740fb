"""Codes to bytes and back: the planes of `numerics.packing`, in a tile of rows.

A plane of width w puts a channel and those `dim * w / 8` bytes away into one byte, so a tile of
codes is cut into chunks of columns, and chunk `t + slot * count` goes to a slot of byte chunk t:

    w = 4, count = 3     [ 0 | 1 | 2 | 3 | 4 | 5 ]  ->  bytes [ 0 + 3<<4 | 1 + 4<<4 | 2 + 5<<4 ]

A vector of a power of two has one byte chunk; one of m runs has m w / 8, of half a run if it must.

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
def store_fields(
    chunks_of_codes, row_pointers, mask,
    N: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, WORDS: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Store one plane of codes given as chunks (ROWS, N) of channels, in order.

    `row_pointers` and `mask` are columns (ROWS, 1). Bits above a code are left out. Instructions
    per element: 1-2.
    """
    SLOTS: tl.constexpr = 8 // WIDTH
    COUNT: tl.constexpr = len(chunks_of_codes) // SLOTS
    pointers = columns(row_pointers, N, LAYOUT) + column_axis(N, LAYOUT)
    if WORDS and N >= 4:
        pointers = tl.multiple_of(pointers, (1, 4))
    wanted = columns(mask, N, LAYOUT)
    for chunk in tl.static_range(COUNT):
        total = chunks_of_codes[chunk] >> SHIFT
        if SLOTS > 1:
            total = total & ((1 << WIDTH) - 1)
        for slot in tl.static_range(1, SLOTS):
            field = chunks_of_codes[slot * COUNT + chunk] >> SHIFT
            if slot + 1 < SLOTS:
                field = field & ((1 << WIDTH) - 1)
            total = total | (field << (slot * WIDTH))
        tl.store(pointers + chunk * N, columns(total.to(tl.uint8), N, LAYOUT), mask=wanted)


@triton.jit
def _store_plane(
    codes, rows, mask,
    ROWS: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr,
    WORDS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    STRIDE: tl.constexpr = N * WIDTH // 8
    fields = chunks(codes, ROWS, N, 8 // WIDTH)
    store_fields(fields, rows, mask, STRIDE, WIDTH, SHIFT, WORDS, LAYOUT)
    for byte in tl.static_range(STRIDE, (STRIDE + 3) // 4 * 4):
        tl.store(rows + byte, 0, mask=mask)


@triton.jit
def store_codes(
    codes, row_pointers, mask,
    ROWS: tl.constexpr, N: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Store codes (ROWS, N), N a power of two, as the planes (width, shift, offset) of PLANES.

    Bytes past the data of a plane, up to a multiple of 4, become zeros.
    """
    for plane in tl.static_range(len(PLANES)):
        _store_plane(
            codes, row_pointers + PLANES[plane][2], mask,
            ROWS, N, PLANES[plane][0], PLANES[plane][1], WORDS, LAYOUT,
        )  # fmt: skip


@triton.jit
def _store_plane_of_runs(
    codes, rows, mask,
    ROWS: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr,
    WORDS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = 1 if len(codes) * WIDTH % 8 == 0 else 2
    STRIDE: tl.constexpr = len(codes) * G * WIDTH // 8
    fields = ()
    for j in tl.static_range(len(codes)):
        fields = fields + chunks(codes[j], ROWS, G, PIECES)
    store_fields(fields, rows, mask, G // PIECES, WIDTH, SHIFT, WORDS, LAYOUT)
    for byte in tl.static_range(STRIDE, (STRIDE + 3) // 4 * 4):
        tl.store(rows + byte, 0, mask=mask)


@triton.jit
def store_runs(
    codes, row_pointers, mask,
    ROWS: tl.constexpr, G: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Store codes given as m runs (ROWS, G), as `store_codes` does."""
    for plane in tl.static_range(len(PLANES)):
        _store_plane_of_runs(
            codes, row_pointers + PLANES[plane][2], mask,
            ROWS, G, PLANES[plane][0], PLANES[plane][1], WORDS, LAYOUT,
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


@triton.constexpr_function
def shifts(width: int) -> str:
    """Return assembly: the fields of four bytes, slot by slot, each in the low bits of a word."""
    fields = 8 // width
    outputs = [(slot, byte) for slot in range(fields) for byte in range(4)]
    return " ".join(
        f"shr.u32 ${i}, ${4 * fields}, {8 * byte + width * slot};"
        for i, (slot, byte) in enumerate(outputs)
    )


@triton.jit
def fields_of(data, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """Return the 8 / WIDTH fields of bytes as int32; unless EXACT with bits of others above them.

    Instructions per field: 1, or 2.
    """
    if EXACT or WIDTH == 8:
        wide = data.to(tl.int32)
        fields = ()
        for slot in tl.static_range(8 // WIDTH):
            fields = fields + ((wide >> (slot * WIDTH)) & ((1 << WIDTH) - 1),)
    else:
        TEXT: tl.constexpr = shifts(WIDTH)
        OUTPUTS: tl.constexpr = "=&r," * (32 // WIDTH) + "r"
        fields = tl.inline_asm_elementwise(
            TEXT, OUTPUTS, [data], dtype=(tl.int32,) * (8 // WIDTH), is_pure=True, pack=4
        )
    return fields


@triton.jit
def _load_plane(
    row_pointers, byte_stride, mask,
    ROWS: tl.constexpr, M: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr,
    EXACT: tl.constexpr, WORDS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return the fields of one plane as M runs (ROWS, G)."""
    SLOTS: tl.constexpr = 8 // WIDTH
    PIECES: tl.constexpr = SLOTS if M == 1 else (1 if M % SLOTS == 0 else 2)  # of a run
    N: tl.constexpr = G // PIECES
    COUNT: tl.constexpr = M * PIECES // SLOTS
    pointers = columns(row_pointers, N, LAYOUT)
    pointers = pointers + column_axis(N, LAYOUT).to(tl.int64) * byte_stride
    if WORDS and N >= 4:
        pointers = tl.multiple_of(pointers, (1, 4))
    wanted = columns(mask, N, LAYOUT)
    chunks_of_bytes = ()
    for chunk in tl.static_range(COUNT):
        data = tl.load(pointers + chunk * N * byte_stride, mask=wanted, other=0)
        chunks_of_bytes = chunks_of_bytes + (fields_of(data, WIDTH, EXACT),)
    runs = ()
    for j in tl.static_range(M):
        pieces = ()
        for i in tl.static_range(PIECES):
            pieces = pieces + (
                chunks_of_bytes[(j * PIECES + i) % COUNT][(j * PIECES + i) // COUNT],
            )
        runs = runs + (columns(joined(pieces, ROWS, G, PIECES), G, LAYOUT),)
    return runs


@triton.jit
def load_runs(
    row_pointers, byte_stride, mask,
    ROWS: tl.constexpr, M: tl.constexpr, G: tl.constexpr, PLANES: tl.constexpr,
    EXACT: tl.constexpr, WORDS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return the codes of vectors as M runs (ROWS, G), int32; M is 1 for a power of two.

    `row_pointers` and `mask` are columns (ROWS, 1). Unless EXACT, codes of one plane have bits of
    others above them. Instructions per element: 1-2 for each plane.
    """
    for plane in tl.static_range(len(PLANES)):
        fields = _load_plane(
            row_pointers + PLANES[plane][2] * byte_stride, byte_stride, mask,
            ROWS, M, G, PLANES[plane][0], EXACT or len(PLANES) > 1, WORDS, LAYOUT,
        )  # fmt: skip
        if plane == 0:
            codes = fields
        else:
            both = ()
            for j in tl.static_range(M):
                both = both + (codes[j] | (fields[j] << PLANES[plane][1]),)
            codes = both
    return codes
