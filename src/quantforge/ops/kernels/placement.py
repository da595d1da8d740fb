"""Which rows a program works on: tiles of one head, or one tile of whatever rows come next."""

from __future__ import annotations

import triton
import triton.language as tl

from quantforge.ops.kernels.layouts import row_axis


@triton.jit
def rows_of_program(
    n, heads, total,
    ROWS: tl.constexpr, TILES: tl.constexpr, PER_ROW: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return batch, head, row and the end of valid rows.

    With PER_ROW all are columns (ROWS, 1), and rows past `total` repeat the last one with an end of
    zero: statistics are loaded without a mask. Otherwise batch, head and end are scalars.
    """
    program = tl.program_id(0)
    local = row_axis(ROWS, LAYOUT)
    if PER_ROW:
        index = program * ROWS + local
        end = tl.where(index < total, n, 0)
        index = tl.minimum(index, total - 1)
        lead = (index // n).to(tl.int64)
        row = index - lead * n
    else:
        programs_per_head = tl.cdiv(n, ROWS * TILES)
        lead = (program // programs_per_head).to(tl.int64)
        row = (program % programs_per_head).to(tl.int64) * (ROWS * TILES) + local
        end = n
    batch = lead // heads
    return batch, lead - batch * heads, row, end
