"""Launches of the products of queries with codes: which kernel, in which shape.

queries   codes        kernel               operands                  error of a score
<= 8      1-4 bits     integer_products,    2 digits (fp16, bf16)     6e-5 of its deviation
                       whole_row_products   3 digits (fp32)           4e-7
                       where rows are short 1 digit (scan)            3e-3 (4 bits) to 0 (1 bit)
more      1-4 bits     matrix_products      fp16, by permutes         2e-4
any       others,      matrix_products      fp16 or fp32 (3 tf32      2e-4, 4e-7
          fp32 query                        products), by a table
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from quantforge.numerics.packing import planes
from quantforge.ops.kernels import decode
from quantforge.ops.kernels.decode import Form, Layout
from quantforge.ops.kernels.products import add_splits, integer_products, matrix_products
from quantforge.ops.kernels.query import project
from quantforge.ops.kernels.rows import Product, Rows
from quantforge.ops.kernels.whole_rows import whole_row_products
from quantforge.ops.launch import INTERPRET, multiprocessors
from quantforge.spec import QuantSpec

MAX_INTEGER_QUERIES = 8
# NVIDIA H200, triton 3.6.0, 2026-11-24: the scan of one query in 10M x 768 at 4 bits takes 974 us,
# with groups of 512 and 1024 rows 989 and 1018
GROUP = 32 if INTERPRET else 256
"""Most rows in a group of `scan`."""
MIN_PERMUTE_ALIGNMENT = 4
ADDED = 512
"""Numbers of a program that adds up splits."""


@dataclass(frozen=True)
class IntegerTuning:
    """Shape of `integer_products`."""

    rows: int
    stages: int
    unroll: int


@dataclass(frozen=True)
class MatrixTuning:
    """Shape of `matrix_products` for up to `queries` queries."""

    queries: int
    rows: int
    warps: int
    stages: int


# untuned (compiled for sm_90: no spills, 102-116 registers, 16 warps of 32 rows per SM)
INTEGER = IntegerTuning(rows=32, stages=3, unroll=1)


@dataclass(frozen=True)
class WholeTuning:
    """Shape of `whole_row_products` for centroids of up to `digits` digits."""

    digits: int
    rows: int
    stages: int


# NVIDIA H200, triton 3.6.0, 2026-11-24: search of one query in 10M x 768 at 4 bits: 1064, 1027,
# 1024 and 1025 us with 16 rows and 1-4 stages, 1010 with 32 rows and 2 stages; reading takes 848.
# Three digits are untuned; compiled for sm_90: no spills
WHOLE = (
    WholeTuning(digits=1, rows=32, stages=2),
    WholeTuning(digits=3, rows=16, stages=1),
)
WHOLE_TILE = 64
MAX_OPERANDS = 12
"""Tiles of 64 numbers of 8 digit columns, 4 registers each."""
WAVES = 4
"""Programs per place on the GPU for a product with all rows, if they are enough."""
WARPS = 16
"""Places on a multiprocessor: warps of 128 registers."""
# untuned; compiled for sm_90: no spills, except 14 registers outside of the inner loop at
# 128 x 128; that leaves room for two programs per SM: one decodes while the other multiplies
MATRIX_PERMUTED_4_BITS = (
    MatrixTuning(queries=16, rows=64, warps=4, stages=3),
    MatrixTuning(queries=32, rows=64, warps=4, stages=3),
    MatrixTuning(queries=64, rows=64, warps=4, stages=3),
    MatrixTuning(queries=128, rows=128, warps=4, stages=3),
)
# untuned; codes of 1-3 bits become four or eight operands at once, which take the registers
MATRIX_PERMUTED = (
    MatrixTuning(queries=16, rows=64, warps=4, stages=2),
    MatrixTuning(queries=32, rows=64, warps=4, stages=2),
    MatrixTuning(queries=64, rows=64, warps=4, stages=2),
    MatrixTuning(queries=128, rows=64, warps=4, stages=2),
)
# untuned
MATRIX_TABLE = (
    MatrixTuning(queries=16, rows=64, warps=4, stages=2),
    MatrixTuning(queries=64, rows=64, warps=8, stages=2),
)
# untuned; float32 operands are twice as wide and three products each
MATRIX_FLOAT32 = (
    MatrixTuning(queries=16, rows=64, warps=4, stages=1),
    MatrixTuning(queries=32, rows=64, warps=8, stages=1),
)


def permutes_on(rows: Rows, spec: QuantSpec) -> bool:
    """Return whether codes are looked up by permutes: on NVIDIA, from words of four bytes."""
    if rows.packed.device.type == "cuda" and torch.version.hip:
        return False
    return decode.permutes(spec) is None and rows.alignment % MIN_PERMUTE_ALIGNMENT == 0


def score(p: Product, dtype: torch.dtype) -> torch.Tensor:
    """Return scores (heads, q, n)."""
    q = p.query.shape[1]
    exact = p.query.dtype in (torch.float32, torch.float64)
    if q <= MAX_INTEGER_QUERIES and permutes_on(p.rows, p.spec):
        return _integer(p, exact, dtype)
    out = p.query.new_empty((p.query.shape[0], q, p.n), dtype=dtype)
    _matrix(p, exact, out, None, 1)
    return out


def scan(p: Product, bitmap: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Return the best score of each group of rows, (q, groups) float32, and the size of a group.

    Groups are runs of rows; scores are without offsets. Queries of any dtype are taken at
    the accuracy of float16. Groups without an allowed row have -inf.
    """
    q = p.query.shape[1]
    if q <= MAX_INTEGER_QUERIES and permutes_on(p.rows, p.spec):
        out = p.query.new_empty((q, -(-p.n // GROUP)), dtype=torch.float32)
        _launch_integer(p, False, out, bitmap, 1)
        return out, GROUP
    tuning = _matrix_tuning(p, False)
    wanted = GROUP * 8 * tuning.warps // tuning.rows
    programs = -(-p.n // tuning.rows) * -(-q // tuning.queries)
    tiles = 1
    while tiles < wanted and programs >= 8 * tiles * multiprocessors(p.query.device):
        tiles *= 2
    programs, classes = -(-p.n // (tuning.rows * tiles)), 8 * tuning.warps
    out = p.query.new_empty((q, programs * classes), dtype=torch.float32)
    _matrix(p, False, out, bitmap, tiles)
    return out, tuning.rows * tiles // classes


def _splits(p: Product, programs: int, layout: Layout) -> int:
    """Return into how many shares of its bytes a row is cut, to fill the GPU with few rows."""
    steps, splits = layout.padded // layout.tile, 1
    while 2 * splits <= steps and programs * splits < 8 * multiprocessors(p.query.device):
        splits *= 2
    return splits


def _integer(p: Product, exact: bool, dtype: torch.dtype) -> torch.Tensor:
    heads, q = p.query.shape[:2]
    programs = heads * -(-p.n // INTEGER.rows)
    splits = _splits(p, programs, decode.layout_of(p.spec, "int8"))
    kind = dtype if splits == 1 else torch.float32
    out = p.query.new_empty((splits, heads, q, p.n), dtype=kind)
    offsets = _launch_integer(p, exact, out, None, splits)
    if splits == 1:
        return out[0]
    total = out.new_empty(out.shape[1:], dtype=dtype)
    add_splits[(-(-total.numel() // ADDED),)](
        out, out if offsets is None else offsets, total, p.n, total.numel(),
        SPLITS=splits, OFFSETS=offsets is not None, BLOCK=ADDED, num_warps=4,
    )  # fmt: skip
    return total


def _launch_integer(
    p: Product,
    exact: bool,
    out: torch.Tensor,
    bitmap: torch.Tensor | None,
    splits: int,
) -> torch.Tensor | None:
    """Run a product of digits; returns the offsets, which it adds unless rows are split.

    `out` is (splits, heads, q, n), or (q, groups) for the best of GROUP rows.
    """
    heads, q = p.query.shape[:2]
    spec = p.spec
    layout = decode.layout_of(spec, "int8")
    scanning = out.ndim == 2
    digits = 1 if spec.code_bits == 1 or scanning else 3 if exact else 2
    query_digits = 4 if exact else 2
    per_tile = 8 // query_digits
    while per_tile < q and per_tile < MAX_INTEGER_QUERIES:
        per_tile *= 2
    alignment = _alignment(p.rows, layout)
    is_whole = alignment == layout.tile // 4 and _fits_whole(layout, per_tile * query_digits)
    is_whole = is_whole and splits == 1
    whole = next(row for row in WHOLE if digits <= row.digits)
    rows, stages = (whole.rows, whole.stages) if is_whole else (INTEGER.rows, INTEGER.stages)
    tiles = 1
    if scanning:
        tiles = GROUP // rows
    elif is_whole:
        places = WAVES * WARPS * multiprocessors(p.query.device)
        tiles = min(max(heads * p.n // (rows * places), 1), GROUP // rows)
    grid = (splits * -(-p.n // (rows * tiles)), -(-q // per_tile), heads)
    if 0 in grid:
        return None
    _, unit = decode.digits_of(spec, digits)
    queries = project(
        p.query,
        p.shift,
        p.equalizer,
        spec,
        layout,
        digits=query_digits,
        per_tile=per_tile,
        unit=unit,
    )
    program = decode.int_program(spec.code_bits, digits)
    arguments = (
        *_common_arguments(p, decode.tables(spec, "int8", digits, out.device), queries.rows),
        queries.weights,
        queries.weights if queries.offsets is None else queries.offsets,
        queries.weights if bitmap is None else bitmap,
        out,
        p.n,
        q,
        p.rows.heads[1],
        tiles,
        *_strides(p.rows, alignment),
    )
    shape = {
        "BITS": spec.code_bits,
        "STRIDE": layout.stride,
        "OFFSET": _one_bit_offset(spec),
        "PARTS": layout.parts,
        "TILE": layout.tile,
        "ALIGNMENT": alignment,
        "ASM": program.text,
        "CONSTRAINTS": program.constraints,
        "REGISTERS": program.registers,
        "DIGITS": digits,
        "SETS": decode.digit_sets(spec),
        "BASE": decode.digit_base(spec),
        "ROWS": rows,
        "QUERIES": per_tile,
        "QUERY_DIGITS": query_digits,
        "SCAN": scanning,
        "OFFSETS": queries.offsets is not None and splits == 1 and not scanning,
        "BITMAP": bitmap is not None,
        "STAGES": stages,
        "num_warps": 1,
    }
    if is_whole:
        whole_row_products[grid](*arguments, **shape)
    else:
        more = {"PADDED": layout.padded, "SPLITS": splits, "UNROLL": INTEGER.unroll}
        integer_products[grid](*arguments, **shape, **more)
    return queries.offsets


def _fits_whole(layout: Layout, columns: int) -> bool:
    """Return whether the operands of a tile of queries fit into the registers of a warp."""
    full = layout.tile == WHOLE_TILE and layout.stride % layout.tile == 0
    operands = layout.stride // layout.tile * layout.parts * columns // 8
    return full and operands <= MAX_OPERANDS


def _permuted(p: Product, exact: bool) -> bool:
    """Return whether `matrix_products` decodes by permutes, to fp16."""
    return not exact and not INTERPRET and permutes_on(p.rows, p.spec)


def _matrix_tuning(p: Product, exact: bool) -> MatrixTuning:
    if exact:
        table = MATRIX_FLOAT32
    elif not _permuted(p, exact):
        table = MATRIX_TABLE
    else:
        table = MATRIX_PERMUTED_4_BITS if p.spec.code_bits == 4 else MATRIX_PERMUTED
    return next((row for row in table if p.query.shape[1] <= row.queries), table[-1])


def _matrix(
    p: Product, exact: bool, out: torch.Tensor, bitmap: torch.Tensor | None, tiles: int
) -> None:
    """Run `matrix_products`."""
    heads, q = p.query.shape[:2]
    spec, tuning = p.spec, _matrix_tuning(p, exact)
    permute = _permuted(p, exact)
    form: Form = "fp16" if permute else "table"
    layout = decode.layout_of(spec, form)
    query_tiles = -(-q // tuning.queries)
    grid = (-(-p.n // (tuning.rows * tiles)) * query_tiles, heads)
    if 0 in grid:
        return
    dtype = torch.float32 if exact else torch.float16
    queries = project(p.query, p.shift, p.equalizer, spec, layout, dtype=dtype)
    scanning = out.ndim == 2
    program = decode.half_program(spec.code_bits) if permute else decode.NO_PROGRAM
    alignment = _alignment(p.rows, layout)
    matrix_products[grid](
        *_common_arguments(p, decode.tables(spec, form, 0, out.device), queries.rows),
        queries.weights,
        queries.weights if queries.offsets is None else queries.offsets,
        queries.weights if bitmap is None else bitmap,
        out,
        p.n,
        q,
        p.rows.heads[1],
        tiles,
        *_strides(p.rows, alignment),
        BITS=spec.code_bits,
        DIM=spec.dim,
        STRIDE=layout.stride,
        OFFSET=_one_bit_offset(spec),
        PADDED=layout.padded,
        PARTS=layout.parts,
        TILE=layout.tile,
        ALIGNMENT=alignment,
        PERMUTE=permute,
        ASM=program.text,
        CONSTRAINTS=program.constraints,
        PLANES=decode.plane_fields(spec),
        PRECISION="tf32x3" if exact else "tf32",
        ROWS=tuning.rows,
        QUERIES=tuning.queries,
        WARPS=tuning.warps,
        SCAN=scanning,
        OFFSETS=queries.offsets is not None and not scanning,
        BITMAP=bitmap is not None,
        STAGES=tuning.stages,
        num_warps=tuning.warps,
    )


def _common_arguments(
    p: Product, table: torch.Tensor, queries: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return p.rows.packed, p.rows.scales, table, queries


def _strides(rows: Rows, alignment: int) -> tuple[int, ...]:
    """Return strides of packed in units of the alignment, then those of scales."""
    return (*(stride // alignment for stride in rows.strides[0]), *rows.strides[1])


def _alignment(rows: Rows, layout: Layout) -> int:
    """Return the bytes a lane loads at once: a quarter of a tile, so that four lanes load it."""
    alignment = gcd(rows.alignment, layout.stride) if layout.form != "table" else rows.alignment
    return min(alignment, max(layout.tile // 4, 1))


def _one_bit_offset(spec: QuantSpec) -> int:
    """Return where the 1-bit plane of 3-bit codes begins."""
    return planes(spec.dim, 3)[1].offset if spec.code_bits == 3 else 0
