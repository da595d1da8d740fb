"""How fused decoding is run: what follows from the codes alone, and how the work is shared out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from quantforge.numerics.pages import PageLayout, page_layout
from quantforge.ops import constants
from quantforge.ops.decode_attention.lookup import HALVE, LOAD_BY_LANE, lookup
from quantforge.ops.launch import capability, multiprocessors
from quantforge.ops.pages import lookup_table
from quantforge.spec import QuantSpec

DENSE_UNIT = 32
"""Dense rows that take a program as long as a page."""
MERGE_NUMBERS = 1 << 11
"""Numbers of partial results that a warp of a merging program holds at a time."""
MERGE_WARPS = 16
"""Most warps of a merging program: with enough of them all splits are read at once."""
MERGE_COLUMNS = 32
"""Least columns of a merging program: 128 bytes, which memory reads at once."""
VALUE_CHANNELS = 32
"""Channels of values decoded at a time: bounds the registers in flight."""


@dataclass(frozen=True)
class Tuning:
    """How to run one combination of codes.

    Attributes:
        registers: most per thread for 8 and for 16 query rows; None for the compiler's choice.
        programs: per multiprocessor, for the number of splits.
        pages: least number in a split.
    """

    registers: tuple[int | None, int | None]
    programs: tuple[int, int]
    pages: int


# by key bits and e4m3; NVIDIA H200, triton 3.6.0, 8 KV heads, dim 128: 8 x 32768 tokens
# (2026-11-24); 16 query rows: 4 x 32768 tokens (2026-11-25)
TUNING = {
    (2, False): Tuning((128, None), (16, 8), 2),
    (2, True): Tuning((128, None), (16, 8), 2),
    (3, False): Tuning((128, None), (16, 8), 2),
    (3, True): Tuning((128, None), (16, 8), 2),
    (4, False): Tuning((128, None), (16, 8), 4),
    (4, True): Tuning((128, None), (16, 8), 4),
}


@dataclass(frozen=True)
class Plan:
    """Everything about a launch that the codes alone decide.

    Attributes:
        layout: of the pages.
        tuning: how to run it.
        constants: compile-time arguments of the fused kernel.
        tables: lookup tables of keys and values; None for values: that of the keys.
        turns: of keys and values, d of R = H diag(d) with a Hadamard matrix H; None where one of
            the rotations is of another kind.
    """

    layout: PageLayout
    tuning: Tuning
    constants: dict[str, object]
    tables: tuple[torch.Tensor, torch.Tensor | None]
    turns: tuple[torch.Tensor, torch.Tensor] | None


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
        "UNIT": DENSE_UNIT,
    }
    turns = k_spec.rotation == v_spec.rotation == "hadamard"
    return Plan(
        layout,
        TUNING[k_spec.bits, k_spec.codebook == "e4m3"],
        compile_time,
        (k_table, None if torch.equal(k_table, v_table) else v_table),
        (_turn(k_spec, device), _turn(v_spec, device)) if turns else None,
    )


@constants.cached_constant
def _turn(spec: QuantSpec, device: torch.device) -> torch.Tensor:
    """Return d (dim,) of a randomized Hadamard rotation R = H diag(d)."""
    return constants.signs(spec.dim, spec.seed, device)[:, 0] * spec.dim**-0.5


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up; `triton.cdiv` costs 7 us a call."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def cut(n_pages: int, n_dense: int, most: int, least_pages: int) -> tuple[int, int]:
    """Return splits, at most `most` and equal, and pages (or units of dense rows) of each."""
    units = n_pages + ceil_div(n_dense, DENSE_UNIT)
    per_split = max(ceil_div(units, most), min(least_pages, n_pages), 1)
    return ceil_div(units, per_split), per_split


class MergeShape(NamedTuple):
    """Sizes of a merging program: query rows, columns, all splits, splits at a time, warps."""

    rows: int
    columns: int
    splits: int
    chunk: int
    warps: int


def merge_shape(
    rows: int, key_heads: int, dim: int, splits: int, device: torch.device
) -> MergeShape:
    """Return small programs that fill the GPU."""
    block, columns, enough = 1, dim, 2 * multiprocessors(device)
    splits = power_of_two(splits)
    while block < rows and key_heads * ceil_div(rows, 2 * block) >= 2 * enough:
        if block * splits * dim > MERGE_NUMBERS:
            break
        block *= 2
    while columns > MERGE_COLUMNS and key_heads * rows * (dim // columns) < enough:
        columns //= 2
    warps = min(power_of_two(ceil_div(block * splits * columns, MERGE_NUMBERS)), MERGE_WARPS)
    chunk = max(min(warps * MERGE_NUMBERS // (block * columns), splits), 1)
    return MergeShape(block, columns, splits, chunk, warps)
