"""Attention by fused kernels: codes are read once and decoded in registers.

    few query rows       `attend`, tokens split over the GPU, and `merge_splits`
    many, half dtypes    `extend`: a chunk of the history at a time through torch's flash kernel
    many, otherwise      `attend` with more query rows per program

The kernels are in `ops.kernels.attend` and `ops.kernels.byte_lookup`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
import triton

from quantforge.numerics.codebook import is_symmetric
from quantforge.numerics.packing import planes
from quantforge.ops import constants
from quantforge.ops.attention import extend
from quantforge.ops.kernels import byte_lookup
from quantforge.ops.kernels.attend import attend, merge_splits
from quantforge.ops.kernels.byte_lookup import Codes
from quantforge.ops.launch import INTERPRET, cannot_run_on, multiprocessors
from quantforge.ops.statistics import equalize_query, restore
from quantforge.spec import QuantSpec

MAX_DIM = 256
MERGE_STEP = 8
"""Splits whose rows are loaded at once."""


@dataclass(frozen=True)
class Tuning:
    """Shape of `attend` for up to `rows` query rows per key head.

    Attributes:
        rows: greatest number of query rows; the last row of a width has no limit.
        width: greatest number of columns of a row of keys or values.
        block_m: query rows per program.
        block_n: tokens per tile.
        num_warps: per program.
        stages: of the pipeline of loads.
        programs: per multiprocessor, which the number of splits aims at.
    """

    rows: int
    width: int
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    programs: int


# untuned; compiled for sm_90: no spills. Instructions per code with 16 query rows, dim 128 and
# 4 bits: 8, of which 3.3 look up, 1.5 gather registers for stores and products, 0.7 go through
# shared memory, which turns tiles into operands
HALF = (
    Tuning(rows=16, width=128, block_m=16, block_n=64, num_warps=4, stages=3, programs=4),
    Tuning(rows=32, width=128, block_m=32, block_n=32, num_warps=4, stages=3, programs=3),
    Tuning(rows=64, width=128, block_m=64, block_n=32, num_warps=8, stages=2, programs=2),
    Tuning(rows=128, width=128, block_m=128, block_n=32, num_warps=8, stages=2, programs=1),
    Tuning(rows=16, width=512, block_m=16, block_n=32, num_warps=4, stages=3, programs=2),
    Tuning(rows=32, width=512, block_m=32, block_n=32, num_warps=4, stages=2, programs=2),
    Tuning(rows=64, width=512, block_m=64, block_n=32, num_warps=8, stages=2, programs=1),
)
# untuned; float32 operands are multiplied without tensor cores, and a pipeline would copy each
# looked up centroid through shared memory
FLOAT32 = (
    Tuning(rows=16, width=128, block_m=16, block_n=32, num_warps=4, stages=1, programs=4),
    Tuning(rows=32, width=128, block_m=32, block_n=32, num_warps=4, stages=1, programs=4),
    Tuning(rows=16, width=512, block_m=16, block_n=32, num_warps=4, stages=1, programs=4),
)
MAX_PARTS = 4
"""With more parts (1-bit codes) tiles are half as long: their operands fill the registers."""


def tuning_of(rows: int, key: Codes, value: Codes, half: bool) -> Tuning:
    """Return the tuning for query rows and codes."""
    width = max(key.width, value.width)
    table = [row for row in (HALF if half else FLOAT32) if width <= row.width]
    # rows of a smaller width come first
    table = [row for row in table if row.width == table[0].width]
    tuning = next((row for row in table if rows <= row.rows), table[-1])
    if max(key.parts, value.parts) > MAX_PARTS and tuning.block_n > 32:
        return replace(tuning, block_n=32)
    return tuning


def supports(
    query: torch.Tensor,
    k_packed: torch.Tensor,
    k_scales: torch.Tensor,
    k_shift: torch.Tensor | None,
    k_equalizer: torch.Tensor | None,
    v_packed: torch.Tensor,
    v_scales: torch.Tensor,
    v_shift: torch.Tensor | None,
    v_equalizer: torch.Tensor | None,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    k_spec_key: str,
    v_spec_key: str,
) -> str | None:
    """Return why these arguments are not for the kernels, or None."""
    if (reason := cannot_run_on(query.device)) is not None:
        return reason
    if INTERPRET and torch.bfloat16 in (query.dtype, None if mask is None else mask.dtype):
        return "the interpreter gets bfloat16 wrong"
    for spec in (QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)):
        if spec.estimator == "prod":
            return "the QJL residual is a second product in another basis"
        if not is_symmetric(spec):
            return "the codebook is not symmetric"
        if spec.dim > MAX_DIM:
            return f"dim {spec.dim} is more than {MAX_DIM}"
    return None


@dataclass(frozen=True, eq=False)
class Operand:
    """Packed keys or values as kernels address them.

    Attributes:
        packed: (B, Hkv, n, bytes), bytes adjacent.
        scales: (B, Hkv, n, 1).
        table: what centroids are looked up in.
        codes: how to read a row.
        strides: of packed over batch, head and row in units of the alignment, then of scales.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    codes: Codes
    strides: tuple[int, ...]


def operand_of(packed: torch.Tensor, scales: torch.Tensor, spec: QuantSpec, half: bool) -> Operand:
    """Return an operand whose centroids become fp16 (half) or float32."""
    packed = packed if packed.stride(-1) == 1 else packed.contiguous()
    alignment = gcd(16, packed.data_ptr() if packed.numel() else 16, *packed.stride()[:3])
    for plane in planes(spec.dim, spec.code_bits):
        alignment = gcd(alignment, plane.offset)
    on_nvidia = packed.device.type == "cuda" and not torch.version.hip
    permute = half and on_nvidia and byte_lookup.permutes(spec)
    strides = (*(stride // alignment for stride in packed.stride()[:3]), *scales.stride()[:3])
    table = byte_lookup.table(spec, permute, half, packed.device)
    return Operand(packed, scales, table, byte_lookup.codes_of(spec, alignment, permute), strides)


def attention(
    query: torch.Tensor,
    k_packed: torch.Tensor,
    k_scales: torch.Tensor,
    k_shift: torch.Tensor | None,
    k_equalizer: torch.Tensor | None,
    v_packed: torch.Tensor,
    v_scales: torch.Tensor,
    v_shift: torch.Tensor | None,
    v_equalizer: torch.Tensor | None,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    k_spec_key: str,
    v_spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::attention` on a GPU.

    float16 and bfloat16 queries meet fp16 operands (relative error of an output about 5e-4),
    others float32 ones; sums are float32.
    """
    k_spec, v_spec = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    batch, kv_heads, n = k_packed.shape[:3]
    heads, length = query.shape[1:3]
    lead = (batch, kv_heads, heads // kv_heads * length)
    grouped = query.reshape(*lead, k_spec.dim)
    half = query.dtype in (torch.float16, torch.bfloat16)
    key = operand_of(k_packed, k_scales, k_spec, half)
    value = operand_of(v_packed, v_scales, v_spec, half)
    rotated = equalize_query(grouped, k_equalizer)
    if mask is None and not is_causal and extend.reason_against(grouped, n, k_spec, v_spec) is None:
        rotated = rotated @ constants.rotation(k_spec, k_spec.seed, query.device).T
        sums, lse = extend.attend_in_chunks(rotated, query.dtype, key, value, scale)
        sums = sums @ constants.rotation(v_spec, v_spec.seed, query.device)
    else:
        rotated = rotated @ byte_lookup.basis(k_spec, query.device).T
        mask = None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        sums, lse = _attend(rotated, key, value, mask, is_causal, scale, length, half)
        sums = sums @ byte_lookup.basis(v_spec, query.device)
    seen = None if v_shift is None else (lse > -torch.inf).to(torch.float32).unsqueeze(-1)
    out = restore(sums, v_shift, v_equalizer, seen)
    if k_shift is not None:
        lse = lse + (grouped.to(torch.float32) * k_shift.to(torch.float32)).sum(-1) * scale
    return out.view(*query.shape[:-1], v_spec.dim), lse.view(query.shape[:-1])


def _attend(
    query: torch.Tensor,
    key: Operand,
    value: Operand,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    length: int,
    half: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sums of centroids (B, Hkv, rows, width) and log-sum-exp (B, Hkv, rows)."""
    batch, kv_heads, rows, _ = query.shape
    heads, n = batch * kv_heads, key.packed.shape[2]
    if is_causal:
        n = min(n, length)  # keys beyond the last query
    out = query.new_empty((batch, kv_heads, rows, value.codes.width), dtype=torch.float32)
    lse = query.new_empty((batch, kv_heads, rows), dtype=torch.float32)
    if not lse.numel():
        return out, lse
    tuning = tuning_of(rows, key.codes, value.codes, half)
    row_tiles = triton.cdiv(rows, tuning.block_m)
    per_split, splits = _split(n, heads * row_tiles, tuning, query.device)
    partial, partial_lse = out, lse
    if splits > 1:
        partial = out.new_empty((splits, *out.shape))
        partial_lse = lse.new_empty((splits, *lse.shape))
    kind, readable, mask_strides = _mask_of(mask, (batch, kv_heads * (rows // length), length))
    attend[(splits, row_tiles, heads)](
        query.contiguous(),
        *(key.packed, key.scales, key.table),
        *(value.packed, value.scales, value.table),
        lse if readable is None else readable,
        partial,
        partial_lse,
        *(rows, length, n, per_split, kv_heads, rows // length, float(scale)),
        *key.strides,
        *value.strides,
        *mask_strides,
        K=key.codes,
        V=value.codes,
        HALF=half,
        MASK=kind,
        CAUSAL=is_causal,
        FINAL=splits == 1,
        BLOCK_M=tuning.block_m,
        BLOCK_N=tuning.block_n,
        STAGES=tuning.stages,
        num_warps=tuning.num_warps,
    )
    if splits > 1:
        lines = heads * rows
        merge_splits[(lines,)](
            *(partial, partial_lse, out, lse, lines, splits),
            SPLITS_PADDED=triton.next_power_of_2(splits),
            STEP=MERGE_STEP,
            WIDTH=value.codes.width,
            num_warps=1 if value.codes.width <= 128 else 2,
        )
    return out, lse


def _split(n: int, programs: int, tuning: Tuning, device: torch.device) -> tuple[int, int]:
    """Return tokens per split and splits, which fill the GPU; both follow from shapes alone."""
    tiles = max(1, triton.cdiv(n, tuning.block_n))
    wanted = max(1, multiprocessors(device) * tuning.programs // programs)
    per_split = triton.cdiv(tiles, min(wanted, tiles)) * tuning.block_n
    return per_split, max(1, triton.cdiv(n, per_split))


def _mask_of(
    mask: torch.Tensor | None, shape: tuple[int, int, int]
) -> tuple[str, torch.Tensor | None, tuple[int, ...]]:
    """Return kind, readable mask and its strides, 0 where it broadcasts."""
    if mask is None:
        return "none", None, (0, 0, 0, 0)
    strides = mask.expand(*shape, mask.shape[-1]).stride()
    if mask.dtype == torch.bool:
        return "bool", mask.view(torch.uint8), strides
    return "float", mask, strides
