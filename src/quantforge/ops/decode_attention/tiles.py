"""Pieces of the fused kernel: tables, pages, operands and the online softmax, on tiles of one warp.

Layouts are those of `mma.m16n8k16`. Where a conversion asserts that it is trivial, registers get
other names and nothing moves.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

RELEASE: gl.constexpr = gl.constexpr("griddepcontrol.launch_dependents; // $0")
WAIT: gl.constexpr = gl.constexpr("griddepcontrol.wait; // $0")
"""Programmatic dependent launch: see `splits`."""
LOWEST: gl.constexpr = gl.constexpr(-1.0e30)
"""Where the running maximum starts: finite, so that masked scores (-inf) give weight 0."""
RESCALE_ABOVE: gl.constexpr = gl.constexpr(8.0)
"""The maximum may lag by 2^8 before sums are rescaled: weights stay in fp16's range."""


@gluon.jit
def dependency(INSTRUCTION: gl.constexpr):
    """Wait for the launch before, or let the next one start."""
    gl.inline_asm_elementwise(INSTRUCTION, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_table(table, E4M3: gl.constexpr, LOAD: gl.constexpr):
    """Return the words of a lookup table, each in a register; e4m3 needs only the last two."""
    FIRST: gl.constexpr = 2 if E4M3 else 0
    words = ()
    for i in gl.static_range(FIRST, 4):
        address = (table + 32 * i).to(gl.int64)
        word = gl.inline_asm_elementwise(
            LOAD, "=r,l", [address], dtype=gl.int32, is_pure=True, pack=1
        )
        words = words + (word,)
    return words + words if E4M3 else words


@gluon.jit
def token_of_row(row):
    """Return the token in a row of a tile of scores: `numerics.pages.token_order`."""
    return row // 32 * 32 + row % 2 + row // 16 % 2 * 2 + row // 2 % 4 * 4 + row // 8 % 2 * 16


@gluon.jit
def like(word, x):
    """Return a word in the shape and layout of x."""
    return gl.full(x.shape, 0, gl.int32, x.type.layout) + word


@gluon.jit
def decode(
    plane0, plane1, row, table,
    ROWS: gl.constexpr, BITS: gl.constexpr, OPERAND: gl.constexpr, PLANE1: gl.constexpr,
    PTX: gl.constexpr, CONSTRAINTS: gl.constexpr, HALVE: gl.constexpr,
):  # fmt: skip
    """Return the parts (ROWS, width) of some rows in fp16, as operand A."""
    x = plane0.slice(row, ROWS).load(OPERAND)
    t0, t1, t2, t3 = like(table[0], x), like(table[1], x), like(table[2], x), like(table[3], x)
    if BITS == 4:
        return gl.inline_asm_elementwise(
            PTX, CONSTRAINTS, [x, t0, t1, t2, t3],
            dtype=(gl.float16, gl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    elif BITS == 2:
        return gl.inline_asm_elementwise(
            PTX, CONSTRAINTS, [x, t0, t1, t2, t3],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        high = plane1.slice(row, ROWS).load(PLANE1)
        odd = gl.inline_asm_elementwise(HALVE, "=r,r", [high], dtype=gl.uint8, is_pure=True, pack=4)
        high = gl.join(high, odd).permute((0, 2, 1)).reshape(x.shape)
        high = gl.convert_layout(high, x.type.layout, assert_trivial=True)
        return gl.inline_asm_elementwise(
            PTX, CONSTRAINTS, [x, high, t0, t1, t2, t3],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=4,
        )  # fmt: skip


@gluon.jit
def stack2(a, b, LAYOUT: gl.constexpr):
    """Stack two (R, N) tiles: registers get other names, nothing moves."""
    R: gl.constexpr = a.shape[0]
    N: gl.constexpr = a.shape[1]
    both = gl.join(a, b).permute((2, 0, 1)).reshape((2 * R, N))
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def stack(tiles, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """Stack 1, 2 or 4 tiles."""
    if COUNT == 1:
        return tiles[0]
    elif COUNT == 2:
        return stack2(tiles[0], tiles[1], LAYOUT)
    else:
        low = stack2(tiles[0], tiles[1], LAYOUT)
        return stack2(low, stack2(tiles[2], tiles[3], LAYOUT), LAYOUT)


@gluon.jit
def fold2(x, LAYOUT: gl.constexpr):
    """Add the two halves of the rows of x."""
    R: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    low, high = gl.split(x.reshape((2, R // 2, N)).permute((1, 2, 0)))
    return gl.convert_layout(low + high, LAYOUT, assert_trivial=True)


@gluon.jit
def fold(x, LAYOUT: gl.constexpr):
    """Add up the tiles of 16 rows, each lane its own."""
    R: gl.constexpr = x.shape[0]
    if R == 16:
        return x
    elif R == 32:
        return fold2(x, LAYOUT)
    else:
        return fold2(fold2(x, LAYOUT), LAYOUT)


@gluon.jit
def as_operand(p, MMA: gl.constexpr):
    """Return weights (R, N) as operand B of a product over tokens in `token_order`."""
    R: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    x = gl.convert_layout(p, gl.DotOperandLayout(1, MMA, 2))
    x = x.reshape((R // 32, 2, 2, 4, 2, N)).permute((0, 2, 3, 1, 4, 5)).reshape((R, N))
    return gl.convert_layout(x, gl.DotOperandLayout(1, MMA, 4), assert_trivial=True)


@gluon.jit
def scales(stored, T: gl.constexpr, PARTS: gl.constexpr, LAYOUT: gl.constexpr, ROW: gl.constexpr):
    """Return the scales of each part of a page's rows, fp16."""
    x = stored.load(LAYOUT).permute((1, 0)).reshape((T,))
    low, high = gl.split(x.reshape((2, T // 2)).permute((1, 0)))
    parts = (low, high)
    if PARTS == 4:
        a, b = gl.split(low.reshape((2, T // 4)).permute((1, 0)))
        c, d = gl.split(high.reshape((2, T // 4)).permute((1, 0)))
        parts = (a, b, c, d)
    out = ()
    for i in gl.static_range(PARTS):
        out = out + (gl.convert_layout(parts[i], ROW, assert_trivial=True),)
    return out


@gluon.jit
def page_at(pages, p, row, BYTES: gl.constexpr):
    """Return the address of page p of a row of the batch, or of its last one."""
    page_table, first, last, HKV, kv_head = row
    page = (first + gl.minimum(p, last)).to(gl.int64)
    if page_table is not None:
        page = gl.load(page_table + page).to(gl.int64)
    return pages + (page * HKV + kv_head) * BYTES


@gluon.jit
def copy_page(
    plane0, plane1, scales, page, offsets0, offsets1, scale_offsets, mask,
    SCALES_AT: gl.constexpr, BITS: gl.constexpr,
):  # fmt: skip
    """Start copying the codes and scales of a page to shared memory."""
    async_copy.async_copy_global_to_shared(plane0, page + offsets0, mask=mask)
    if BITS == 3:
        async_copy.async_copy_global_to_shared(plane1, page + offsets1, mask=mask)
    at = (page + SCALES_AT).to(gl.pointer_type(gl.float16))
    async_copy.async_copy_global_to_shared(scales, at + scale_offsets, mask=mask)
    async_copy.commit_group()


@gluon.jit
def soft_cap(s, cap):
    """Return `cap * tanh(s / cap)`; s and cap in units of log2."""
    x = s / cap
    e = gl.exp2(-2.885390081777927 * gl.abs(x))  # exp(-2 |x|)
    t = (1.0 - e) / (1.0 + e)
    return cap * gl.where(x < 0, -t, t)


@gluon.jit
def online(s, m, mass, acc, COUNT: gl.constexpr, PARTS: gl.constexpr):
    """Raise the running maximum to the scores' if it lags too far, and rescale what it scaled."""
    top = s[0]
    for i in gl.static_range(COUNT - 1):
        top = gl.maximum(top, s[i + 1])
    peak = gl.max(top, 0)
    if gl.max(peak - m, 0) > RESCALE_ABOVE:
        new = gl.maximum(m, peak)
        alpha = gl.exp2(m - new)
        m = new
        mass = mass * alpha[None, :]
        scaled = ()
        for i in gl.static_range(PARTS):
            scaled = scaled + (acc[i] * alpha[None, :],)
        acc = scaled
    return m, mass, acc


@gluon.jit
def nothing(N: gl.constexpr, PARTS: gl.constexpr, VC: gl.constexpr, MMA: gl.constexpr):
    """Return maximum, mass and output of N query rows that have seen nothing."""
    acc = ()
    for _ in gl.static_range(PARTS):
        acc = acc + (gl.zeros((VC, N), gl.float32, MMA),)
    m = gl.full((N,), LOWEST, gl.float32, gl.SliceLayout(0, MMA))
    return m, gl.zeros((16, N), gl.float32, MMA), acc


@gluon.jit
def write(
    out, lse, row, inside, m, mass, acc,
    DV: gl.constexpr, VC: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """Write normalized outputs and log2-sum-exps of query rows; of those that saw nothing, -inf."""
    total = gl.sum(mass, 0)
    seen = total > 0
    gl.store(lse + row, gl.where(seen, m + gl.log2(total), float("-inf")), mask=inside)
    inverse = 1.0 / total
    at = (out + row * DV)[None, :] + gl.arange(0, VC, ROW)[:, None]
    for i in gl.static_range(DV // VC):
        gl.store(at + i * VC, acc[i] * inverse[None, :], mask=(inside & seen)[None, :])
