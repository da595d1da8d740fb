"""The part of the fused kernel that reads sinks and recent tokens, which are not packed."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from quantforge.ops.decode_attention.tiles import online, soft_cap


@gluon.jit
def dense_rows(
    m, mass, acc, query, key, value, begin, end, n_tokens, n_sinks, rows, q_len,
    last_seen, visible_from, mask_row, softcap, scale, query_h, query_q, key_n, value_n, group,
    D: gl.constexpr, DV: gl.constexpr, N: gl.constexpr, SOFTCAP: gl.constexpr, VC: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """Attend to sinks and recent tokens [begin, end) in the model's dtype, 16 at a time.

    Goes on from, and returns, the maximum, mass and sums of what was seen before.
    """
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    # channels are summed in any order, so a lane takes eight neighbours: loads of 16 bytes
    KEY: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    QUERY: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // VC, VC // 8], [1, 1], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, VC // 8, [1, 0])
    dtype: gl.constexpr = key.dtype.element_ty
    d = gl.arange(0, D, gl.SliceLayout(1, QUERY))
    row = group * N + gl.arange(0, N, gl.SliceLayout(0, QUERY))
    q_at = query + row // q_len * query_h + row % q_len * query_q
    q = gl.load(q_at[None, :] + d[:, None], mask=(row < rows)[None, :], other=0.0).to(dtype)
    values = gl.allocate_shared_memory(dtype, [DV // VC, 16, VC], SHARED)
    copy_row = gl.arange(0, 16, gl.SliceLayout(1, COPY))
    copy_column = gl.arange(0, VC, gl.SliceLayout(0, COPY))
    k_row = gl.arange(0, 16, gl.SliceLayout(1, KEY))
    k_column = gl.arange(0, D, gl.SliceLayout(0, KEY))
    for first in range(begin, end, 16):
        r = first + copy_row
        for i in gl.static_range(DV // VC):
            v_at = value + r[:, None].to(gl.int64) * value_n + (i * VC + copy_column)[None, :]
            buffer = values.index(i)
            async_copy.async_copy_global_to_shared(buffer, v_at, mask=(r < end)[:, None])
        async_copy.commit_group()
        r = first + k_row
        k_at = key + r[:, None].to(gl.int64) * key_n + k_column[None, :]
        k = gl.load(k_at, mask=(r < end)[:, None], other=0.0)
        s = mma_v2(k, q, gl.zeros((16, N), gl.float32, MMA)) * scale
        if SOFTCAP:
            s = soft_cap(s, softcap)
        t = first + gl.arange(0, 16, ROW)
        place = gl.where(t < n_sinks, t, t + n_tokens)[:, None]
        seen = (place >= visible_from[None, :]) & (place <= last_seen[None, :])
        seen = seen & (t < end)[:, None]
        if mask_row is not None:
            seen = seen & (gl.load(mask_row[None, :] + place, mask=seen, other=0) != 0)
        s = gl.where(seen, s, float("-inf"))
        m, mass, acc = online((s,), m, mass, acc, 1, DV // VC)
        async_copy.wait_group(0)
        weight = gl.exp2(s - m[None, :])
        mass = mass + weight
        w = gl.convert_layout(weight.to(dtype), B)
        new = ()
        for i in gl.static_range(DV // VC):
            v = values.index(i).permute((1, 0)).load(A)
            new = new + (mma_v2(v, w, acc[i]),)
        acc = new
    return m, mass, acc
