"""Search by fused kernels: scan, select, rescore, select.

    scan      products of all rows with the queries; only the best score of each group of 256
              rows is written: 1 / 256 of the (q, n) scores           `ops.kernels.score`
    select    the k + margin best groups of each query               `ops.kernels.select`
    rescore   the rows of those groups, in float32, as (score, row)  below
    select    the k best rows

The k best rows lie in the k groups with the best scores: a row outside of them has k rows before
it, also among equals, because groups are runs of rows. So no threshold has to be guessed and
nothing can overflow. Scores of the scan are rough (`ops.kernels.score`); the margin of groups makes
up for that unless scores nearly tie.

Every launch has a fixed shape: the search can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantforge.ops.kernels import decode
from quantforge.ops.kernels.products import allowed_rows, gather
from quantforge.ops.kernels.query import Queries, project
from quantforge.ops.kernels.rows import Product, product_of, reason_against
from quantforge.ops.kernels.score import GROUP, scan
from quantforge.ops.kernels.select import (
    best_of_keys,
    best_of_scores,
    key_of,
    row_of,
    score_of,
)
from quantforge.ops.launch import INTERPRET
from quantforge.spec import QuantSpec

MAX_K = 200
"""With its margin this makes 256, which a program still sorts in registers."""
MAX_GROUP_SCORES = 1 << 26
MAX_KEYS = 1 << 25
"""Group scores and keys held at once, 256 MiB each: more queries are searched in parts."""
RESCORE_ROWS = 64 if INTERPRET else 16


def supports(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    spec_key: str,
) -> str | None:
    """Return why these arguments are not for the kernels, or None."""
    if k > MAX_K:
        return f"k = {k} is more than {MAX_K}"
    return reason_against(query, packed, scales, QuantSpec.from_key(spec_key))


def search(
    query: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    equalizer: torch.Tensor | None,
    filter_bitmap: torch.Tensor | None,
    k: int,
    spec_key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `quantforge::search`."""
    spec = QuantSpec.from_key(spec_key)
    n, keep = packed.shape[0], _kept_groups(k)
    if n == 0 or query.shape[0] == 0:
        shape = (query.shape[0], k)
        absent = torch.full(shape, -torch.inf, device=query.device)
        return absent, torch.full(shape, -1, dtype=torch.int64, device=query.device)
    step = min(MAX_GROUP_SCORES * GROUP // n, MAX_KEYS // (keep * GROUP))
    step = max(1, step // 128 * 128 or step)
    parts = []
    for start in range(0, query.shape[0], step):
        part = query[start : start + step]
        with torch.cuda.device_of(packed):
            product = product_of(part, packed, scales, shift, equalizer, spec)
            parts.append(_search(product, filter_bitmap, k, keep))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _kept_groups(k: int) -> int:
    """Return k and a margin, up to a power of two."""
    keep: int = triton.next_power_of_2(k + max(8, k // 4))
    return keep


def _search(
    p: Product, bitmap: torch.Tensor | None, k: int, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    best, size = scan(p, bitmap)
    selected = best_of_scores(best, keep)
    queries, keys = _rescore(p, selected, size, bitmap)
    offsets = None if queries.offsets is None else queries.offsets.view(-1)
    return best_of_keys(keys, k, offsets)


@triton.jit
def _rescore_rows(
    packed, scales, table, queries, weights, selected, bitmap, keys,
    n, stride_p, stride_s,
    DIM: tl.constexpr, STRIDE: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, PLANES: tl.constexpr, ALIGNMENT: tl.constexpr,
    SIZE: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
    BITMAP: tl.constexpr,
):  # fmt: skip
    """Score ROWS rows of one selected group of one query; writes keys (q, KEEP * group)."""
    query = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of KEEP * SIZE
    key = tl.load(selected + query * KEEP + place // SIZE)  # the same for all
    rows = row_of(key) * SIZE + place % SIZE
    found = (score_of(key) > float("-inf")) & allowed_rows(bitmap, rows, n, BITMAP)
    row = tl.multiple_of(packed, ALIGNMENT) + rows[:, None] * stride_p * ALIGNMENT
    columns = tl.arange(0, TILE)[None, :]
    total = tl.zeros((ROWS, TILE), tl.float32)
    for start in tl.range(0, PADDED, TILE):
        inside = found[:, None] & (start + columns < STRIDE)
        base = tl.load(row + start + columns, mask=inside, other=0).to(tl.int32)
        for part in tl.static_range(PARTS):
            channel = start + columns + part * STRIDE
            live = inside & (channel < DIM)
            value = gather(row, base, live, channel, table, part, PLANES, PLANES[0][0])
            ask = queries + query * (PARTS * PADDED) + part * PADDED + start + columns
            total += value * tl.load(ask)
    scale = tl.load(scales + rows * stride_s, mask=found, other=0.0).to(tl.float32)
    score = tl.sum(total, 1) * scale * tl.load(weights + query)
    found = found & (score == score)
    score = tl.where(found, score, float("-inf"))
    key = key_of(score, tl.where(found, rows, 4294967295))
    tl.store(keys + query * (KEEP * SIZE) + place, key)


def _rescore(
    p: Product, selected: torch.Tensor, size: int, bitmap: torch.Tensor | None
) -> tuple[Queries, torch.Tensor]:
    """Return float32 queries with their offsets, and the keys of all rows of selected groups."""
    spec, (q, keep) = p.spec, selected.shape
    layout = decode.layout_of(spec, "table")
    queries = project(p.query, p.shift, p.equalizer, spec, layout, dtype=torch.float32)
    keys = torch.empty((q, keep * size), dtype=torch.int64, device=selected.device)
    rows = min(RESCORE_ROWS, size)
    alignment = p.rows.alignment
    _rescore_rows[(keep * size // rows, q)](
        p.rows.packed,
        p.rows.scales,
        decode.tables(spec, "table", 0, selected.device),
        queries.rows,
        queries.weights,
        selected,
        queries.weights if bitmap is None else bitmap,
        keys,
        p.n,
        p.rows.strides[0][2] // alignment,
        p.rows.strides[1][2],
        DIM=spec.dim,
        STRIDE=layout.stride,
        PADDED=layout.padded,
        PARTS=layout.parts,
        TILE=layout.tile,
        PLANES=decode.plane_fields(spec),
        ALIGNMENT=alignment,
        SIZE=size,
        KEEP=keep,
        ROWS=rows,
        BITMAP=bitmap is not None,
        num_warps=4,
    )
    return queries, keys
