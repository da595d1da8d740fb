"""The fused kernel: one warp attends some query rows to some dense rows and a range of pages.

    tokens on M, query rows on N         S = K q       mma.m16n8k16: 16 tokens, 8 rows, 16 channels
                                         O^T = V^T P   16 channels, 8 rows, 16 tokens

Codes go global -> shared (`cp.async`) -> registers in operand layout (`ldmatrix`), where they are
decoded in place; keys and values take turns, so each has half an iteration to arrive. One warp has
no barriers to wait at, and its softmax needs three shuffles per page. What is counted, per code at
4 bits (128 + 128 channels, 64 tokens, 8 rows; sm_90, `nvdisasm`): 2.2 instructions, 1.5 of them for
the half-rate integer pipe; e4m3 2.0 and 1.3. Gluon rather than plain Triton, because the compiler
otherwise moves the codes through shared memory once more after decoding.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from quantforge.ops.decode_attention.dense import dense_rows
from quantforge.ops.decode_attention.tiles import (
    RELEASE,
    WAIT,
    as_operand,
    copy_page,
    decode,
    dependency,
    fold,
    load_table,
    nothing,
    online,
    page_at,
    scales,
    soft_cap,
    stack,
    token_of_row,
    write,
)
from quantforge.ops.decode_attention.turn import load_query, restore

# a change of these must not compile the kernel again
LENGTHS = [
    "n_tokens",
    "n_dense",
    "n_sinks",
    "window",
    "per_split",
    "n_pages",
    "pages_per_row",
    "rows",
    "q_len",
]


@gluon.jit(do_not_specialize=LENGTHS)
def decode_kernel(
    query, k_equalizer, k_shift, k_turn, k_pages, v_pages, k_table, v_table,
    v_equalizer, v_shift, v_turn,
    page_table, seqlens, starts, dense_lens, k_dense, v_dense, mask, out, lse,
    n_tokens, n_dense, n_sinks, window, per_split, n_pages, pages_per_row, rows, q_len,
    softcap, scale,
    query_b, query_h, query_q, ke_b, ke_h, ks_b, ks_h, ve_b, ve_h, vs_b, vs_h,
    kd_b, kd_h, kd_n, vd_b, vd_h, vd_n, mask_b, mask_h, mask_q,
    HKV: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, N: gl.constexpr, T: gl.constexpr,
    K_BITS: gl.constexpr, V_BITS: gl.constexpr, K_E4M3: gl.constexpr, V_E4M3: gl.constexpr,
    SOFTCAP: gl.constexpr, WINDOW: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_DENSE: gl.constexpr, PDL: gl.constexpr,
    K_PTX: gl.constexpr, K_OPERANDS: gl.constexpr, V_PTX: gl.constexpr, V_OPERANDS: gl.constexpr,
    LOAD: gl.constexpr, HALVE: gl.constexpr, K_PLANE1: gl.constexpr, V_PLANE1: gl.constexpr,
    SCALES: gl.constexpr, VC: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """Attend N query rows of one key head to one range of keys.

    Grid: (groups of N rows, splits, B * Hkv). A program takes `per_split` of `n_pages` pages and,
    behind them, of as many units of UNIT dense rows as there are. Writes normalized outputs (B *
    Hkv, splits, rows, DV) and log2-sum-exps; where nothing was visible only a log-sum-exp of -inf.
    `softcap` and `scale` are in units of log2.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]
    )
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    COL: gl.constexpr = gl.SliceLayout(0, MMA)
    if PDL:
        dependency(WAIT)
    group = gl.program_id(0)
    split = gl.program_id(1)
    head = gl.program_id(2)
    b = head // HKV
    kv_head = head % HKV
    if seqlens is not None:
        n_tokens = gl.load(seqlens + b)
    if dense_lens is not None:
        n_dense = gl.load(dense_lens + b)
    start = 0
    if starts is not None:
        start = gl.load(starts + b)
    # first visible position of each query row, and its own, counted over sinks, pages, recent rows
    n = gl.arange(0, N, COL)
    row = group * N + n
    position = n_tokens + n_dense - q_len + row % q_len
    last_seen = position if CAUSAL else position * 0 + (n_tokens + n_dense)
    visible_from = gl.zeros((N,), gl.int32, COL) + start
    if WINDOW:
        visible_from = gl.maximum(visible_from, position - window + 1)

    mask_row = mask
    if mask is not None:
        query_head = head % HKV * (rows // q_len) + gl.minimum(row, rows - 1) // q_len
        mask_row = mask + b.to(gl.int64) * mask_b + query_head * mask_h + row % q_len * mask_q
    query += b.to(gl.int64) * query_b + kv_head * (rows // q_len) * query_h
    m, mass, acc = nothing(N, DV // VC, VC, MMA)
    KP: gl.constexpr = 2 if K_BITS == 4 else 4
    VP: gl.constexpr = 2 if V_BITS == 4 else 4
    KW: gl.constexpr = D // KP  # bytes of plane 0 of a key
    VW: gl.constexpr = T // VP  # bytes of plane 0 of a channel of values
    TP: gl.constexpr = T // VP  # tokens of a part
    K_AT: gl.constexpr = T * D * K_BITS // 8
    V_AT: gl.constexpr = T * DV * V_BITS // 8
    K_BYTES: gl.constexpr = K_AT + 2 * T
    V_BYTES: gl.constexpr = V_AT + 2 * T
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 4)
    first = split * per_split
    last = gl.minimum(gl.minimum(first + per_split, n_pages), (n_tokens + T - 1) // T)
    if start > n_sinks:  # pages that no row can see
        first = gl.maximum(first, (start - n_sinks) // T)
    if WINDOW:
        lowest = n_tokens + n_dense - q_len - window + 1
        first = gl.maximum(first, (lowest - n_sinks) // T)
    if first < last:
        K_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [512 // KW, KW // 16], [1, 1], [1, 0])
        V_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [512 // VW, VW // 16], [1, 1], [1, 0])
        COPY1: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [1, 1], [1, 0])
        S_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // T * 8, T // 64], [1, 1], [1, 0])
        K_SHARED: gl.constexpr = gl.SwizzledSharedLayout(16, 128 // KW, KW // 16, [1, 0])
        V_SHARED: gl.constexpr = gl.SwizzledSharedLayout(16, 128 // VW, VW // 16, [1, 0])
        SHARED1: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 1, [1, 0])
        S_SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
        k_codes = load_table(k_table, K_E4M3, LOAD)
        v_codes = k_codes
        if v_table is not None:
            v_codes = load_table(v_table, V_E4M3, LOAD)
        r = gl.arange(0, T, gl.SliceLayout(1, K_COPY))
        c = gl.arange(0, KW, gl.SliceLayout(0, K_COPY))
        token = token_of_row(r)
        k_offsets = token[:, None] * KW + c[None, :]
        r = gl.arange(0, DV, gl.SliceLayout(1, V_COPY))
        c = gl.arange(0, VW, gl.SliceLayout(0, V_COPY))
        v_offsets = r[:, None] * VW + c[None, :]
        r = gl.arange(0, 8, gl.SliceLayout(1, S_COPY))
        c = gl.arange(0, T // 8, gl.SliceLayout(0, S_COPY))
        s_offsets = r[:, None] * (T // 8) + c[None, :]
        k_shared = gl.allocate_shared_memory(gl.uint8, [T, KW], K_SHARED)
        v_shared = gl.allocate_shared_memory(gl.uint8, [DV, VW], V_SHARED)
        k_scales = gl.allocate_shared_memory(gl.float16, [8, T // 8], S_SHARED)
        v_scales = gl.allocate_shared_memory(gl.float16, [8, T // 8], S_SHARED)
        k_shared1 = k_shared
        v_shared1 = v_shared
        k_offsets1 = k_offsets
        v_offsets1 = v_offsets
        if K_BITS == 3:
            r = gl.arange(0, T, gl.SliceLayout(1, COPY1))
            c = gl.arange(0, 16, gl.SliceLayout(0, COPY1))
            token = token_of_row(r)
            k_offsets1 = T * KW + (token[:, None] * 16 + c[None, :])
            k_shared1 = gl.allocate_shared_memory(gl.uint8, [T, 16], SHARED1)
        if V_BITS == 3:
            r = gl.arange(0, DV, gl.SliceLayout(1, COPY1))
            c = gl.arange(0, 16, gl.SliceLayout(0, COPY1))
            v_offsets1 = DV * VW + (r[:, None] * 16 + c[None, :])
            v_shared1 = gl.allocate_shared_memory(gl.uint8, [DV, 16], SHARED1)

        kv_pages = (page_table, b * pages_per_row, last - 1, HKV, kv_head)
        copy_page(
            k_shared, k_shared1, k_scales, page_at(k_pages, first, kv_pages, K_BYTES),
            k_offsets, k_offsets1, s_offsets, first < last, K_AT, K_BITS,
        )  # fmt: skip
        copy_page(
            v_shared, v_shared1, v_scales, page_at(v_pages, first, kv_pages, V_BYTES),
            v_offsets, v_offsets1, s_offsets, first < last, V_AT, V_BITS,
        )  # fmt: skip
        if k_equalizer is not None:
            k_equalizer += b * ke_b + kv_head * ke_h
        if k_shift is not None:
            k_shift += b * ks_b + kv_head * ks_h
        q_row = group * N + gl.arange(0, N, gl.SliceLayout(0, B))
        q_at = query + q_row // q_len * query_h + q_row % q_len * query_q
        q, q_scale, shifted = load_query(
            q_at, q_row < rows, k_equalizer, k_shift, k_turn, scale, KW, KP, N, B
        )
        shifted = gl.convert_layout(shifted, COL)

        for p in range(first, last):
            async_copy.wait_group(1)
            ks = scales(k_scales, T, VP, SCALES, ROW)
            s = ()
            for i in gl.static_range(VP):
                tiles = ()
                for h in gl.static_range(TP // 16):
                    k = decode(
                        k_shared, k_shared1, i * TP + h * 16, k_codes,
                        16, K_BITS, A, K_PLANE1, K_PTX, K_OPERANDS, HALVE,
                    )  # fmt: skip
                    x = gl.zeros((16, N), gl.float32, MMA)
                    for j in gl.static_range(KP):
                        x = mma_v2(k[j], q[j], x)
                    tiles = tiles + (x,)
                x = stack(tiles, TP // 16, MMA) * (ks[i].to(gl.float32) * q_scale)[:, None]
                if SOFTCAP:
                    x = soft_cap(x + shifted[None, :], softcap)
                s = s + (x,)
            copy_page(
                k_shared, k_shared1, k_scales, page_at(k_pages, p + 1, kv_pages, K_BYTES),
                k_offsets, k_offsets1, s_offsets, p + 1 < last, K_AT, K_BITS,
            )  # fmt: skip
            # a page at the end of the row or of somebody's view
            hidden = (p + 1) * T > n_tokens
            if mask is not None:
                hidden = True
            if starts is not None:
                hidden = hidden | (n_sinks + p * T < start)
            if WINDOW:
                hidden = hidden | (n_sinks + p * T < n_tokens + n_dense - window)
            if hidden:
                # opaque, or the masks are computed for every page before the branch
                first_token = gl.inline_asm_elementwise(
                    "mov.b32 $0, $1;", "=r,r", [p * T], dtype=gl.int32, is_pure=False, pack=1
                )
                masked = ()
                for i in gl.static_range(VP):
                    t = gl.arange(0, TP, ROW)
                    t = token_of_row(t)
                    t = first_token + i * TP + t
                    place = n_sinks + t[:, None]
                    seen = (t < n_tokens)[:, None] & (place >= visible_from[None, :])
                    if mask is not None:
                        seen = seen & (gl.load(mask_row[None, :] + place, mask=seen, other=0) != 0)
                    masked = masked + (gl.where(seen, s[i], float("-inf")),)
                s = masked
            m, mass, acc = online(s, m, mass, acc, VP, DV // VC)
            async_copy.wait_group(1)
            vs = scales(v_scales, T, VP, SCALES, ROW)
            w = ()
            for i in gl.static_range(VP):
                weight = gl.exp2(s[i] - m[None, :])
                mass = mass + fold(weight, MMA)
                w = w + (as_operand(weight.to(gl.float16) * vs[i][:, None], MMA),)
            new = ()
            for i in gl.static_range(DV // VC):
                v = decode(
                    v_shared, v_shared1, i * VC, v_codes,
                    VC, V_BITS, A, V_PLANE1, V_PTX, V_OPERANDS, HALVE,
                )  # fmt: skip
                x = acc[i]
                for j in gl.static_range(VP):
                    x = mma_v2(v[j], w[j], x)
                new = new + (x,)
            acc = new
            copy_page(
                v_shared, v_shared1, v_scales, page_at(v_pages, p + 1, kv_pages, V_BYTES),
                v_offsets, v_offsets1, s_offsets, p + 1 < last, V_AT, V_BITS,
            )  # fmt: skip
        async_copy.wait_group(0)
        if k_shift is not None and not SOFTCAP:
            m = m + shifted  # the same for all packed keys
        if v_equalizer is not None:
            v_equalizer += b * ve_b + kv_head * ve_h
        if v_shift is not None:
            v_shift += b * vs_b + kv_head * vs_h
        acc = restore(acc, gl.sum(mass, 0), v_equalizer, v_shift, v_turn, VC, DV // VC, ROW)
    dense_end = (split * per_split + per_split - n_pages) * UNIT
    if HAS_DENSE and dense_end > 0:
        m, mass, acc = dense_rows(
            m, mass, acc, query,
            k_dense + b.to(gl.int64) * kd_b + kv_head.to(gl.int64) * kd_h,
            v_dense + b.to(gl.int64) * vd_b + kv_head.to(gl.int64) * vd_h,
            gl.maximum(dense_end - per_split * UNIT, 0), gl.minimum(dense_end, n_dense),
            n_tokens, n_sinks, rows, q_len, last_seen, visible_from, mask_row,
            softcap, scale, query_h, query_q, kd_n, vd_n, group,
            D, DV, N, SOFTCAP, VC, MMA,
        )  # fmt: skip
    if PDL:  # not earlier: programs of the merge would sit where others still work
        dependency(RELEASE)
    at = (head * gl.num_programs(1) + split).to(gl.int64) * rows + row
    write(out, lse, at, row < rows, m, mass, acc, DV, VC, ROW)
