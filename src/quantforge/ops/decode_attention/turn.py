"""Hadamard transforms of columns that lie in the registers of a warp, and what goes with them.

A query is turned where it is an operand of the scores, an output where it is a sum: no launch and
no memory of their own. Which bit of a channel is where, in tiles of `mma.m16n8k16`:

    operand B of K q, four channels a lane    0-1 registers   2-3 lanes 1, 2       others registers
    sums of V^T p                             0-2 lanes 4, 8, 16                   others registers

Instructions per number: 1 for a bit in registers, 2 for one in lanes. For 128 channels of 8 rows
that is 290 for the query and 320 for the output; with loads, statistics and the rest a program
issues 1,070 more than without, and 1,140 for each page (sm_90, `nvdisasm`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FP16_HEADROOM: gl.constexpr = gl.constexpr(16384.0)


@gluon.jit
def _across_lanes(x, LANE: gl.constexpr):
    """Return the stage of lanes LANE apart: sums in the lower lane, differences in the upper."""
    TEXT: gl.constexpr = f"""{{
        .reg .b32 lane;
        .reg .f32 other, sign;
        .reg .pred upper;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, {LANE};
        setp.ne.u32 upper, lane, 0;
        selp.f32 sign, 0fBF800000, 0f3F800000, upper;
        shfl.sync.bfly.b32 other, $1, {LANE}, 0x1f, 0xffffffff;
        fma.rn.f32 $0, $1, sign, other;
        }}"""
    return gl.inline_asm_elementwise(TEXT, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _across_registers(x, STRIDE: gl.constexpr):
    """Return the stage of rows STRIDE apart, which a lane holds both."""
    ROWS: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    a, b = gl.split(x.reshape((ROWS // (2 * STRIDE), 2, STRIDE, N)).permute((0, 2, 3, 1)))
    y = gl.join(a + b, a - b).permute((0, 3, 1, 2)).reshape((ROWS, N))
    return gl.convert_layout(y, x.type.layout, assert_trivial=True)


@gluon.jit
def _across_parts(parts, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """Return the stage of parts STRIDE apart."""
    out = ()
    for i in gl.static_range(COUNT):
        if (i & STRIDE) == 0:
            out = out + (parts[i] + parts[i + STRIDE],)
        else:
            out = out + (parts[i - STRIDE] - parts[i],)
    return out


@gluon.jit
def transform(
    parts, COUNT: gl.constexpr,
    FIRST_BIT: gl.constexpr, LANE_BITS: gl.constexpr, FIRST_LANE: gl.constexpr,
):  # fmt: skip
    """Return `H x` of columns x (COUNT * ROWS, N) in parts of ROWS, float32, H of +-1.

    Bits FIRST_BIT to FIRST_BIT + LANE_BITS of a row are those of a lane from FIRST_LANE on.
    """
    ROWS: gl.constexpr = parts[0].shape[0]
    turned = ()
    for i in gl.static_range(COUNT):
        x = parts[i]
        for bit in gl.static_range(8):
            if (1 << bit) < ROWS:
                if bit >= FIRST_BIT and bit < FIRST_BIT + LANE_BITS:
                    x = _across_lanes(x, FIRST_LANE << (bit - FIRST_BIT))
                else:
                    x = _across_registers(x, 1 << bit)
        turned = turned + (x,)
    for bit in gl.static_range(4):
        if (1 << bit) < COUNT:
            turned = _across_parts(turned, COUNT, 1 << bit)
    return turned


@gluon.jit
def load_query(
    at, inside, equalizer, shift, turn, scale,
    WIDTH: gl.constexpr, PARTS: gl.constexpr, N: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """Return query rows as operand B (parts of (WIDTH, N), fp16), their factor, and `q . shift`.

    They are `scale R (equalizer q)`, with R = H diag(turn); without `turn` they are not turned.
    Rows whose numbers might leave fp16 (a turned number is at most the norm) are divided by a
    power of two, their factor. `at` and `inside` are those of the N rows.
    """
    COLUMN: gl.constexpr = gl.SliceLayout(0, B)
    d = gl.arange(0, WIDTH, gl.SliceLayout(1, B))
    logits = gl.zeros((N,), gl.float32, COLUMN)
    squares = gl.zeros((N,), gl.float32, COLUMN)
    q = ()
    for i in gl.static_range(PARTS):
        c = i * WIDTH + d
        x = gl.load(at[None, :] + c[:, None], mask=inside[None, :], other=0.0)
        x = x.to(gl.float32) * scale
        if shift is not None:
            logits = logits + gl.sum(x * gl.load(shift + c).to(gl.float32)[:, None], 0)
        if equalizer is not None:
            x = x * gl.load(equalizer + c).to(gl.float32)[:, None]
        squares = squares + gl.sum(x * x, 0)
        if turn is not None:
            x = x * gl.load(turn + c)[:, None]
        q = q + (x,)
    norm = gl.sqrt(gl.max(squares, 0))
    exponent = gl.ceil(gl.log2(gl.maximum(norm / FP16_HEADROOM, 1.0)))
    if turn is not None:
        q = transform(q, PARTS, 2, 2, 1)
    inverse = gl.exp2(-exponent)
    halves = ()
    for i in gl.static_range(PARTS):
        halves = halves + ((q[i] * inverse).to(gl.float16),)
    return halves, gl.exp2(exponent), logits


@gluon.jit
def restore(
    acc, mass, equalizer, shift, turn,
    VC: gl.constexpr, PARTS: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """Return `equalizer * R^T acc + shift * mass`, sums of values from sums of centroids."""
    if turn is not None:
        acc = transform(acc, PARTS, 0, 3, 4)
    restored = ()
    for i in gl.static_range(PARTS):
        x = acc[i]
        d = i * VC + gl.arange(0, VC, ROW)
        if turn is not None:
            gain = gl.load(turn + d)
            if equalizer is not None:
                gain = gain * gl.load(equalizer + d).to(gl.float32)
            x = x * gain[:, None]
        if shift is not None:
            x = x + gl.load(shift + d).to(gl.float32)[:, None] * mass[None, :]
        restored = restored + (x,)
    return restored
