"""Many queries against pages: chunks of the history through torch's dense attention kernels.

The history is decoded a chunk at a time in rotated space, the rotated query rows of a key head
attend to it without a mask, and the dense tokens (sinks, recent, the queries' own) are one causal
call beside it. All merge by their log-sum-exp (arXiv 2205.14135, section 3.1).

    rotate_queries, then for each chunk decode_pages, cuDNN or flash; flash, causal; merge_extended

    memory     one chunk and its output, merged pairwise: no more with a longer history
    traffic    codes once; a chunk is written and read once per 128 query rows, partly in L2
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from quantforge.numerics.pages import page_layout
from quantforge.ops import constants, flash
from quantforge.ops.decode_attention.lookup import lookup
from quantforge.ops.kernels.chunk import merge_chunk
from quantforge.ops.kernels.page_chunk import decode_pages, merge_extended, rotate_queries
from quantforge.ops.launch import INTERPRET, capability, multiprocessors
from quantforge.ops.merge import Partial
from quantforge.ops.pages import lookup_table
from quantforge.spec import QuantSpec

FLASH_ROWS = 128
"""Query rows of one program of the dense kernels."""
MIN_ROWS = 129
"""Fewer query rows of a key head are better served by the kernel that splits the tokens."""
PAD_ROWS = 256
"""Query rows come in multiples: cuDNN builds a plan for each number."""
EDGE_ROWS = 64
EDGE_COLUMNS = 32


def reason_against(
    query: torch.Tensor,
    kv_heads: int,
    n_tokens: int,
    n_own: int,
    is_causal: bool,
    varies: bool,
    spec_keys: tuple[str, str],
) -> str | None:
    """Return why a call is not for dense kernels, or None.

    `n_own` are the dense tokens behind the packed ones. `varies`: some of lengths on the device,
    mask, padding, window or soft-cap is given, so that not all queries see all of the history.
    """
    if varies:
        return "queries do not all see the same history"
    if capability(query.device)[0] < 8 and not INTERPRET:
        return "the flash kernel needs an NVIDIA GPU of capability 8.0"
    k_dim, v_dim = (QuantSpec.from_key(key).dim for key in spec_keys)
    if k_dim != v_dim:
        return f"dims are {k_dim} and {v_dim}"
    batch, heads, length, _ = query.shape
    if is_causal and n_own < length:
        return f"{n_own} recent tokens do not cover {length} queries"
    rows = heads // kv_heads * length
    programs = batch * kv_heads * -(-rows // FLASH_ROWS)
    if n_tokens == 0 or rows < MIN_ROWS or 2 * programs < multiprocessors(query.device):
        return f"{rows} query rows of {batch * kv_heads} heads do not fill the GPU"
    return None


class _Plan(NamedTuple):
    """What the codes decide about the launches.

    Attributes:
        tokens: in a page.
        tables: of the lookups of keys and values.
        constants: compile-time arguments of `decode_pages`.
        rotations: of keys and values, each a matrix of terms and its unit.
    """

    tokens: int
    tables: tuple[torch.Tensor, torch.Tensor]
    constants: dict[str, object]
    rotations: tuple[tuple[torch.Tensor, float], tuple[torch.Tensor, float]]


@lru_cache(maxsize=64)
def _plan(k_spec_key: str, v_spec_key: str, device: torch.device) -> _Plan:
    k_spec, v_spec = QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key)
    tokens = page_layout(k_spec, v_spec).tokens
    k_ptx, k_operands = lookup(k_spec.bits, k_spec.codebook == "e4m3")
    v_ptx, v_operands = lookup(v_spec.bits, v_spec.codebook == "e4m3")
    table = _entries if INTERPRET else lookup_table
    constants = {
        "D": k_spec.dim, "T": tokens, "K_BITS": k_spec.bits, "V_BITS": v_spec.bits,
        "K_PTX": k_ptx, "K_OPERANDS": k_operands, "V_PTX": v_ptx, "V_OPERANDS": v_operands,
    }  # fmt: skip
    return _Plan(
        tokens,
        (table(k_spec, device), table(v_spec, device)),
        constants,
        (_rotation(k_spec, device), _rotation(v_spec, device)),
    )


def extend_attention(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor | None,
    n_tokens: int,
    k_dense: torch.Tensor | None,
    v_dense: torch.Tensor | None,
    n_dense: int,
    is_causal: bool,
    k_shift: torch.Tensor | None,
    k_equalizer: torch.Tensor | None,
    v_shift: torch.Tensor | None,
    v_equalizer: torch.Tensor | None,
    scale: float,
    k_spec_key: str,
    v_spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to all packed tokens and causally to the dense ones; `reason_against` must be None.

    Returns output (B, Hq, q, dim) in the query's dtype and log-sum-exp (B, Hq, q) in float32.
    """
    plan = _plan(k_spec_key, v_spec_key, query.device)
    batch, heads, q_len, dim = query.shape
    kv_heads, tokens = k_pages.shape[1], plan.tokens
    rows = heads // kv_heads * q_len
    padded = -(-rows // PAD_ROWS) * PAD_ROWS
    rotated = query.new_empty((batch, kv_heads, padded, dim))
    offsets = None
    if k_shift is not None:
        offsets = query.new_empty((batch, kv_heads, rows), dtype=torch.float32)
    cut = flash.chunks(n_tokens, flash.longest_chunk(4 * dim * batch * kv_heads, rows))
    capacity = -(-max(length for _, length in cut) // tokens) * tokens
    keys, values = query.new_empty((2, batch, kv_heads, capacity, dim))
    matrix, unit = plan.rotations[0]
    rotate_queries[(padded // EDGE_ROWS, batch * kv_heads)](
        query, matrix, k_equalizer, k_shift, rotated, offsets,
        rows, q_len, padded, float(scale), unit, *query.stride()[:3],
        *_strides(k_equalizer), *_strides(k_shift),
        HKV=kv_heads, D=dim, TERMS=len(matrix), ROWS=EDGE_ROWS, COLUMNS=EDGE_COLUMNS,
        num_warps=4,
    )  # fmt: skip
    history = _History(rows)
    pages_per_row = len(k_pages) // batch if page_table is None else page_table.shape[1]
    for first, length in cut:
        decode_pages[(-(-length // tokens), batch * kv_heads, 2)](
            k_pages, v_pages, *plan.tables, page_table, keys, values, first // tokens,
            pages_per_row, capacity,
            HKV=kv_heads, **plan.constants, num_warps=4,
        )  # fmt: skip
        history.add(flash.attend(rotated, keys[:, :, :length], values[:, :, :length], scale))
    dense = None
    if k_dense is not None and v_dense is not None and n_dense > 0:
        recent = (k_dense[:, :, :n_dense], v_dense[:, :, :n_dense])
        dense = flash.flash(query, *recent, scale, is_causal)
    return _merge(query, history, dense, offsets, plan, v_equalizer, v_shift, kv_heads)


class _History:
    """Attention over the chunks so far, in one part or two."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.first: Partial | None = None
        self.last: Partial | None = None
        self._is_sum = False

    def add(self, part: Partial) -> None:
        """Add a chunk; a third part makes one of the two before it."""
        if self.first is None or self.last is None:
            self.first, self.last = self.last, part
            return
        if not self._is_sum:
            out, lse = self.first
            total = (
                torch.empty(out.shape, dtype=torch.float32, device=out.device),
                torch.empty(lse.shape, dtype=torch.float32, device=out.device),
            )
            _merge_into(*total, self.first, self.rows, True)
            self.first, self._is_sum = total, True
        _merge_into(*self.first, self.last, self.rows, False)
        self.last = part


def _merge_into(
    out: torch.Tensor, lse: torch.Tensor, part: Partial, rows: int, is_first: bool
) -> None:
    batch, heads, padded, dim = out.shape
    merge_chunk[(-(-rows // EDGE_ROWS), batch * heads)](
        out, lse, *part, padded, heads, *part[0].stride()[:3], *part[1].stride(),
        DIM=dim, COLUMNS=dim, ROWS=EDGE_ROWS, IS_FIRST=is_first, num_warps=4,
    )  # fmt: skip


def _merge(
    query: torch.Tensor,
    history: _History,
    dense: Partial | None,
    offsets: torch.Tensor | None,
    plan: _Plan,
    equalizer: torch.Tensor | None,
    shift: torch.Tensor | None,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, q_len, dim = query.shape
    rows = heads // kv_heads * q_len
    out = torch.empty((batch, heads, q_len, dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device)
    parts: list[torch.Tensor | None] = []
    strides: list[int] = []
    for part in (history.first, history.last, dense):
        parts += [None, None] if part is None else [*part]
        strides += [0] * 6 if part is None else [*part[0].stride()[:3], *part[1].stride()]
    matrix, unit = plan.rotations[1]
    merge_extended[(-(-rows // EDGE_ROWS), batch * kv_heads)](
        *parts, offsets, matrix, equalizer, shift, out, lse, rows, q_len, unit,
        *strides, *_strides(equalizer), *_strides(shift),
        HKV=kv_heads, D=dim, TERMS=len(matrix), ROWS=EDGE_ROWS, COLUMNS=EDGE_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out, lse


def _strides(statistic: torch.Tensor | None) -> tuple[int, int]:
    """Return the strides of a statistic (dim,) or (..., 1, dim) over batch and head."""
    if statistic is None or statistic.ndim < 3:
        return 0, 0
    b = statistic.stride(0) if statistic.ndim == 4 and statistic.shape[0] > 1 else 0
    return b, statistic.stride(-3) if statistic.shape[-3] > 1 else 0


@constants.cached_constant
def _rotation(spec: QuantSpec, device: torch.device) -> tuple[torch.Tensor, float]:
    """Return a rotation as (terms, dim, dim) bfloat16 numbers to be added up, and their unit.

    A Hadamard matrix is +-1 and one term; the interpreter gets float32.
    """
    exact = spec.rotation == "hadamard"
    unit = spec.dim**-0.5 if exact else 1.0
    matrix = constants.rotation(spec, spec.seed, device) / unit
    matrix = matrix.round() if exact else matrix
    if INTERPRET:
        return matrix[None], unit
    high = matrix.to(torch.bfloat16)
    low = (matrix - high.to(torch.float32)).to(torch.bfloat16)
    return (high[None] if exact else torch.stack([high, low])), unit


@constants.cached_constant
def _entries(spec: QuantSpec, device: torch.device) -> torch.Tensor:
    """Return what the interpreter looks up: centroids, or their magnitudes at 4 bits."""
    centroids = constants.centroids(spec, device)
    return centroids[len(centroids) // 2 :].contiguous() if spec.bits == 4 else centroids
