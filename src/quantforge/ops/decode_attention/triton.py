"""Launcher of the fused decode kernel: rotate the query, attend split by split, merge.

Three launches whatever the length. The grid depends on shapes and host-side lengths only; with
lengths on the device it covers the capacity, and programs beyond a row's length return at once, so
a captured graph stays valid while the rows grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from quantforge.numerics.pages import PageLayout, page_layout, why_no_pages
from quantforge.ops import constants
from quantforge.ops.decode_attention import extend
from quantforge.ops.decode_attention.edges import merge_kernel, project_kernel
from quantforge.ops.decode_attention.lookup import HALVE, LOAD_BY_LANE, lookup
from quantforge.ops.launch import cannot_run_on, capability, multiprocessors
from quantforge.ops.pages import lookup_table
from quantforge.spec import QuantSpec

LOG2E = 1.4426950408889634
TILE = 16
"""Tokens in a tile of a tensor core."""
COLUMNS = (32, 128)
"""Columns of a rotation that a projecting program holds: few while programs are few."""
MERGE_NUMBERS = 1 << 11
"""Numbers of partial results that a warp of a merging program holds at a time."""
MERGE_WARPS = (4, 16)
"""Least and most warps of a merging program: with enough of them all slots are read at once."""
VALUE_CHANNELS = 32
"""Channels of values decoded at a time: bounds the registers in flight."""


@dataclass(frozen=True)
class Tuning:
    """How to run one combination of codes.

    Attributes:
        max_registers: per thread for 8 query rows, or None for the compiler's choice; 16 rows need
            more than half of a thread's registers, and the compiler chooses.
        programs: per multiprocessor, for the number of splits.
        pages: least number in a split.
    """

    max_registers: int | None
    programs: int
    pages: int


# by key bits and e4m3; NVIDIA H200, triton 3.6.0, 2026-11-24: 8 x 32768 tokens, 8 KV heads, dim 128
TUNING = {
    (2, False): Tuning(128, 16, 2),
    (2, True): Tuning(128, 16, 2),
    (3, False): Tuning(128, 16, 2),
    (3, True): Tuning(128, 16, 2),
    (4, False): Tuning(128, 16, 4),
    (4, True): Tuning(128, 16, 4),
}


def supports(query: torch.Tensor, *args: object) -> str | None:
    """Return why the fused kernel cannot run these arguments, or None."""
    if (reason := cannot_run_on(query.device)) is not None:
        return reason
    if query.device.type != "cuda":
        return "Gluon kernels do not run in the interpreter"
    k_dense = args[6]
    if isinstance(k_dense, torch.Tensor) and k_dense.dtype != query.dtype:
        return f"query is {query.dtype} and the dense rows are {k_dense.dtype}"
    return why_not(str(args[-2]), str(args[-1]), query.device, query.dtype)


@lru_cache
def why_not(
    k_spec_key: str, v_spec_key: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return why the fused kernel cannot run these codes on a GPU, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the model computes in {dtype}; the tensor cores take float16 and bfloat16"
    k_spec, v_spec = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    if (reason := why_no_pages(k_spec, v_spec)) is not None:
        return reason
    needed = (8, 9) if "e4m3" in (k_spec.codebook, v_spec.codebook) else (8, 0)
    if (found := capability(device)) < needed:
        return f"it needs an NVIDIA GPU of compute capability {needed}; this one has {found}"
    return None


@dataclass(frozen=True)
class Plan:
    """Everything about a launch that the codes alone decide.

    Attributes:
        layout: of the pages.
        tuning: how to run it.
        constants: compile-time arguments of the fused kernel.
        tables: lookup tables of keys and values; None for values: that of the keys.
        rotations: of keys and values, fp16, for Hadamard rotations in units of `units`.
        units: factors of the rotations.
    """

    layout: PageLayout
    tuning: Tuning
    constants: dict[str, object]
    tables: tuple[torch.Tensor, torch.Tensor | None]
    rotations: tuple[torch.Tensor, torch.Tensor]
    units: tuple[float, float]


@lru_cache
def plan_of(k_spec_key: str, v_spec_key: str, device: torch.device) -> Plan:
    """Return the plan for two specs on a device."""
    from triton.experimental.gluon import language as gl

    def plane1(rows: int) -> object:
        """Bytes of plane 1 as operand A holds those of plane 0: four in a lane, 8 rows apart."""
        registers = [[0, 1], [0, 2]] + [[1 << k, 0] for k in range(3, rows.bit_length() - 1)]
        return gl.DistributedLinearLayout(
            reg_bases=registers,
            lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
            warp_bases=[],
            block_bases=[],
            shape=[rows, 16],
        )

    def scales(tokens: int) -> object:
        """Scales of the rows of a lane: those of group g are neighbours."""
        return gl.DistributedLinearLayout(
            reg_bases=[[0, 1 << k] for k in range((tokens // 8).bit_length() - 1)],
            lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
            warp_bases=[],
            block_bases=[],
            shape=[8, tokens // 8],
        )

    k_spec, v_spec = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    layout = page_layout(k_spec, v_spec)
    k_table, v_table = lookup_table(k_spec, device), lookup_table(v_spec, device)
    k_ptx, k_operands = lookup(k_spec.bits, k_spec.codebook == "e4m3")
    v_ptx, v_operands = lookup(v_spec.bits, v_spec.codebook == "e4m3")
    compile_time = {
        "D": k_spec.dim,
        "DV": v_spec.dim,
        "T": layout.tokens,
        "K_BITS": k_spec.bits,
        "V_BITS": v_spec.bits,
        "K_E4M3": k_spec.codebook == "e4m3",
        "V_E4M3": v_spec.codebook == "e4m3",
        "PDL": capability(device) >= (9, 0),
        "K_PTX": k_ptx,
        "K_OPERANDS": k_operands,
        "V_PTX": v_ptx,
        "V_OPERANDS": v_operands,
        "LOAD": LOAD_BY_LANE,
        "HALVE": HALVE,
        "K_PLANE1": plane1(16),
        "V_PLANE1": plane1(VALUE_CHANNELS),
        "SCALES": scales(layout.tokens),
        "VC": VALUE_CHANNELS,
    }
    return Plan(
        layout,
        TUNING[k_spec.bits, k_spec.codebook == "e4m3"],
        compile_time,
        (k_table, None if torch.equal(k_table, v_table) else v_table),
        (_rotation(k_spec, device)[0], _rotation(v_spec, device)[0]),
        (_rotation(k_spec, device)[1], _rotation(v_spec, device)[1]),
    )


@constants.cached_constant
def _rotation(spec: QuantSpec, device: torch.device) -> tuple[torch.Tensor, float]:
    """Return a rotation as an fp16 matrix and its unit: a Hadamard matrix is +-1, exactly."""
    unit = spec.dim**-0.5 if spec.rotation == "hadamard" else 1.0
    matrix = constants.rotation(spec, spec.seed, device) / unit
    if spec.rotation == "hadamard":
        matrix = matrix.round()
    return matrix.to(torch.float16), unit


def _strides(statistic: torch.Tensor | None) -> tuple[int, int]:
    """Return the strides of a statistic (dim,) or (..., 1, dim) over batch and head."""
    if statistic is None or statistic.ndim < 4:
        return 0, statistic.stride(0) if statistic is not None and statistic.ndim == 3 else 0
    b, h = statistic.stride()[:2]
    return (b if statistic.shape[0] > 1 else 0), (h if statistic.shape[1] > 1 else 0)


def _ceil_div(a: int, b: int) -> int:  # triton.cdiv costs 7 us a call
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


class Cut(NamedTuple):
    """How the rows of a batch are shared by programs.

    Attributes:
        splits: programs for a group of query rows.
        pages: of each of them.
        dense: dense rows of each of the first `dense_slots`, a multiple of a tile.
        dense_slots: how many of them have dense rows.
    """

    splits: int
    pages: int
    dense: int
    dense_slots: int


def _cut(n_pages: int, n_dense: int, groups: int, tuning: Tuning, device: torch.device) -> Cut:
    """Cut rows into splits so that all programs fit on the GPU at once."""
    most = max(tuning.programs * multiprocessors(device) // max(groups, 1), 1)
    pages = max(_ceil_div(n_pages, most), tuning.pages)
    splits = max(_ceil_div(n_pages, pages), min(_ceil_div(n_dense, 2 * TILE), most))
    pages = _ceil_div(n_pages, max(splits, 1))
    dense = _ceil_div(n_dense, max(splits, 1) * TILE) * TILE
    return Cut(splits, pages, dense, _ceil_div(n_dense, max(dense, 1)))


def _mask_strides(mask: torch.Tensor | None) -> tuple[int, int, int]:
    """Return the strides of a mask over batch, query heads and queries, 0 where it broadcasts."""
    if mask is None:
        return 0, 0, 0
    b, h, q = (
        stride if size > 1 else 0
        for stride, size in zip(mask.stride()[:3], mask.shape[:3], strict=True)
    )
    return b, h, q


def decode_attention(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor | None,
    seqlens: torch.Tensor | None,
    n_tokens: int,
    starts: torch.Tensor | None,
    k_dense: torch.Tensor | None,
    v_dense: torch.Tensor | None,
    dense_lens: torch.Tensor | None,
    n_dense: int,
    n_sinks: int,
    mask: torch.Tensor | None,
    is_causal: bool,
    k_shift: torch.Tensor | None,
    k_equalizer: torch.Tensor | None,
    v_shift: torch.Tensor | None,
    v_equalizer: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    k_spec_key: str,
    v_spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::decode_attention` on NVIDIA GPUs."""
    from quantforge.ops.decode_attention.fused import decode_kernel

    device = query.device
    plan = plan_of(k_spec_key, v_spec_key, device)
    layout, tuning, pdl = plan.layout, plan.tuning, bool(plan.constants["PDL"])
    batch, heads, q_len, dim = query.shape
    kv_heads = k_pages.shape[1]
    rows = heads // kv_heads * q_len
    if rows >= extend.MIN_ROWS:
        varying = (seqlens, dense_lens, starts, mask)
        varies = any(t is not None for t in varying) or softcap != 0 or window != 0
        n_own = 0 if k_dense is None else n_dense - n_sinks
        key_value = (k_spec_key, v_spec_key)
        fits = extend.reason_against(query, kv_heads, n_tokens, n_own, is_causal, varies, key_value)
        if fits is None:
            return extend.extend_attention(
                query, k_pages, v_pages, page_table, n_tokens, k_dense, v_dense, n_dense,
                is_causal, k_shift, k_equalizer, v_shift, v_equalizer, scale, *key_value,
            )  # fmt: skip
    width = 8 if rows <= 8 else 16
    groups = _ceil_div(rows, width)
    key_heads = batch * kv_heads

    pages_per_row = page_table.shape[1] if page_table is not None else len(k_pages) // batch
    n_pages = pages_per_row if seqlens is not None else _ceil_div(n_tokens, layout.tokens)
    dense_rows = 0
    if k_dense is not None:
        dense_rows = k_dense.shape[2] if dense_lens is not None else n_dense
    cut = _cut(n_pages, dense_rows, batch * kv_heads * groups, tuning, device)
    slots = cut.dense_slots + cut.splits

    out = query.new_empty((batch, heads, q_len, v_dim := plan.rotations[1].shape[0]))
    lse = query.new_empty((batch, heads, q_len), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if slots == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    padded = groups * width
    row_block = _ceil_div(padded, 16) * 16
    projected = query.new_empty((key_heads, row_block, dim), dtype=torch.float16)
    query_scale = lse.new_empty((key_heads, row_block // 16))
    shift_logits = lse.new_empty((key_heads, rows)) if k_shift is not None else None
    columns = min(COLUMNS[key_heads > 2 * multiprocessors(device)], dim)
    project_kernel[(key_heads, dim // columns, row_block // 16)](
        query, plan.rotations[0], k_equalizer, k_shift, projected, query_scale, shift_logits,
        rows, q_len, scale, plan.units[0], *query.stride()[:3], *_strides(k_equalizer),
        *_strides(k_shift),
        HKV=kv_heads, D=dim, ROWS=row_block, COLUMNS=columns,
        PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip
    partial = lse.new_empty((key_heads, slots, rows, v_dim))
    partial_lse = lse.new_empty((key_heads, slots, rows))
    dense_strides = (0,) * 6
    if k_dense is not None and v_dense is not None:
        dense_strides = (*k_dense.stride()[:3], *v_dense.stride()[:3])
    decode_kernel[(groups, cut.splits, key_heads)](
        projected, query_scale, shift_logits if softcap else None, query, k_pages, v_pages,
        *plan.tables, page_table, seqlens, starts, dense_lens, k_dense, v_dense, mask, partial,
        partial_lse, n_tokens, n_dense if k_dense is not None else 0, n_sinks, window,
        cut.dense_slots, cut.dense, cut.pages, pages_per_row, rows, q_len, row_block,
        softcap * LOG2E, scale * LOG2E, *query.stride()[:3], *dense_strides,
        *_mask_strides(mask),
        HKV=kv_heads, N=width, SOFTCAP=softcap != 0, WINDOW=window != 0, CAUSAL=is_causal,
        HAS_DENSE=k_dense is not None, **plan.constants,
        num_warps=1, maxnreg=tuning.max_registers if width == 8 else None, launch_pdl=pdl,
    )  # fmt: skip
    block = min(_power_of_two(rows), 16)
    while block > 1 and key_heads * _ceil_div(rows, block) < 2 * multiprocessors(device):
        block //= 2
    splits = _power_of_two(slots)
    least, most = MERGE_WARPS
    warps = min(max(splits * block * v_dim // MERGE_NUMBERS, least), most)
    merge_kernel[(_ceil_div(rows, block), key_heads)](
        partial, partial_lse, None if softcap else shift_logits, plan.rotations[1], v_equalizer,
        v_shift, out, lse, slots, cut.dense_slots, rows, plan.units[1],
        *_strides(v_equalizer), *_strides(v_shift),
        HKV=kv_heads, DV=v_dim, ROWS=block, SPLITS=splits,
        CHUNK=max(min(warps * MERGE_NUMBERS // (block * v_dim), splits), 1),
        PDL=pdl, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return out, lse
