"""Kernels of mixed search: products of packed rows with integer queries, run by run."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from quantforge.ops.kernels.products import allowed_rows, gather
from quantforge.ops.kernels.select import key_of


@dataclass(frozen=True)
class Group:
    """How kernels read one group of channels: tile by tile, one field of the bytes at a time.

    Attributes:
        bytes: of a row.
        dim: channels.
        stride: bytes of the base plane.
        tile: bytes of a tile.
        tiles: of the base plane.
        parts: fields of a byte of the base plane.
        start: where the integers of a query begin.
        size: integers of a query (of one digit).
        wide: whether they are two digits.
        planes: width, shift, offset and stride of each plane.
    """

    bytes: int
    dim: int
    stride: int
    tile: int
    tiles: int
    parts: int
    start: int
    size: int
    wide: bool
    planes: tuple[tuple[int, int, int, int], ...]


@triton.constexpr_function
def group_of(groups: tuple, g: int) -> object:
    """Return one of a tuple of constants, which Triton itself does not index when it is nested."""
    return groups[g]


@triton.jit
def _products(
    packed, rows, live, table, ask, asked,
    GROUPS: tl.constexpr, G: tl.constexpr, N: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Return sums of products of rows (N,) with queries, (N, QUERIES) float32, of group G."""
    GROUP: tl.constexpr = group_of(GROUPS, G)
    TILE: tl.constexpr = GROUP.tile
    STRIDE: tl.constexpr = GROUP.stride
    PARTS: tl.constexpr = GROUP.parts
    PLANES: tl.constexpr = GROUP.planes
    WIDE: tl.constexpr = GROUP.wide
    WIDTH: tl.constexpr = PLANES[0][0]
    columns = tl.arange(0, TILE)
    row = packed + rows[:, None] * GROUP.bytes
    total = tl.zeros((N, QUERIES), tl.float32)
    wide = tl.zeros((N, QUERIES), tl.int32)
    for tile in tl.range(0, GROUP.tiles):
        start = tile * TILE
        inside = live[:, None] & (start + columns < STRIDE)[None, :]
        base = tl.load(row + start + columns[None, :], mask=inside, other=0).to(tl.int32)
        for part in tl.static_range(PARTS):
            channel = (start + columns + part * STRIDE)[None, :]
            value = gather(
                row, base, inside & (channel < GROUP.dim), channel, table, part, PLANES, WIDTH
            )
            place = GROUP.start + part * GROUP.tiles * TILE + start + columns[:, None]
            operand = tl.load(ask + place, mask=asked, other=0.0)  # (tile, QUERIES)
            if WIDE:
                high = tl.dot(value, operand, out_dtype=tl.float32).to(tl.int32)
                operand = tl.load(ask + GROUP.size + place, mask=asked, other=0.0)
                low = tl.dot(value, operand, out_dtype=tl.float32).to(tl.int32)
                wide += high * 64 + low
            else:
                total = tl.dot(value, operand, total, out_dtype=tl.float32)
    if WIDE:
        total = wide.to(tl.float32)
    return total


@triton.jit
def scan_runs(
    packed, tables, scales, offsets, integers, weights, base, bitmap, entries, visitors, places,
    best, unit, count, n, width, groups,
    GROUPS: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr, QUERIES: tl.constexpr,
    BITMAP: tl.constexpr,
):  # fmt: skip
    """Write the best score of one run of one entry, for each of its visits."""
    entry = entries + tl.program_id(0).to(tl.int64) % count * 4
    run = tl.program_id(0).to(tl.int64) // count
    first = tl.load(entry) + run * RUN
    end = tl.load(entry + 1)
    if first < end:
        visit = tl.load(entry + 2) + tl.arange(0, QUERIES)
        there = visit < tl.load(entry + 3)
        query = tl.load(visitors + visit, mask=there, other=0)
        ask = integers + query[None, :] * width
        added = tl.load(base + visit, mask=there, other=0.0)[None, :]
        found = tl.full((QUERIES,), float("-inf"), tl.float32)
        for tile in tl.range(0, RUN // N):
            rows = first + tile * N + tl.arange(0, N)
            live = rows < end
            total = tl.zeros((N, QUERIES), tl.float32)
            for g in tl.static_range(len(GROUPS)):
                sums = _products(
                    packed[g], rows, live, tables[g], ask, there[None, :], GROUPS, g, N, QUERIES
                )
                weight = tl.load(weights + query * groups + g, mask=there, other=0.0)
                total += sums * weight[None, :]
            scale = tl.load(scales + rows, mask=live, other=0.0).to(tl.float32)
            offset = tl.load(offsets + rows, mask=live, other=0.0).to(tl.float32) * unit
            score = (total * scale[:, None] + offset[:, None]) + added
            live = live & allowed_rows(bitmap, rows, n, BITMAP)
            score = tl.where(live[:, None] & (score == score), score, float("-inf"))
            found = tl.maximum(found, tl.max(score, 0))
        place = tl.load(places + visit, mask=there, other=0) + run
        tl.store(best + place, found, mask=there)


@triton.jit
def rescore_runs(
    packed, tables, scales, offsets, integers, weights, added, bitmap, firsts, ends, keys, unit,
    n, width, groups,
    GROUPS: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr, BITMAP: tl.constexpr,
):  # fmt: skip
    """Write keys of N rows of one selected run of one query."""
    query = tl.program_id(1).to(tl.int64)
    place = query * tl.num_programs(0) * N + tl.program_id(0) * N
    selected = place // RUN
    rows = tl.load(firsts + selected) + place % RUN + tl.arange(0, N)
    live = rows < tl.load(ends + selected)
    total = tl.zeros((N,), tl.float32)
    for g in tl.static_range(len(GROUPS)):
        sums = _sums(packed[g], rows, live, tables[g], integers + query * width, GROUPS, g, N)
        total += sums * tl.load(weights + query * groups + g)
    scale = tl.load(scales + rows, mask=live, other=0.0).to(tl.float32)
    offset = tl.load(offsets + rows, mask=live, other=0.0).to(tl.float32) * unit
    score = (total * scale + offset) + tl.load(added + selected)
    live = live & allowed_rows(bitmap, rows, n, BITMAP) & (score == score)
    score = tl.where(live, score, float("-inf"))
    key = key_of(score, tl.where(live, rows, 4294967295))
    tl.store(keys + place + tl.arange(0, N), key)


@triton.jit
def _sums(
    packed, rows, live, table, ask, GROUPS: tl.constexpr, G: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Return the sums of products of rows (N,) with one query, float32, of group G."""
    GROUP: tl.constexpr = group_of(GROUPS, G)
    TILE: tl.constexpr = GROUP.tile
    STRIDE: tl.constexpr = GROUP.stride
    PARTS: tl.constexpr = GROUP.parts
    PLANES: tl.constexpr = GROUP.planes
    WIDE: tl.constexpr = GROUP.wide
    WIDTH: tl.constexpr = PLANES[0][0]
    columns = tl.arange(0, TILE)[None, :]
    row = packed + rows[:, None] * GROUP.bytes
    total = tl.zeros((N, TILE), tl.int32)
    for tile in tl.range(0, GROUP.tiles):
        start = tile * TILE
        inside = live[:, None] & (start + columns < STRIDE)
        base = tl.load(row + start + columns, mask=inside, other=0).to(tl.int32)
        for part in tl.static_range(PARTS):
            channel = start + columns + part * STRIDE
            value = gather(
                row, base, inside & (channel < GROUP.dim), channel, table, part, PLANES, WIDTH
            )
            place = GROUP.start + part * GROUP.tiles * TILE + start + columns
            z = tl.load(ask + place).to(tl.int32)
            if WIDE:
                z = z * 64 + tl.load(ask + GROUP.size + place).to(tl.int32)
            total += value.to(tl.int32) * z
    return tl.sum(total, 1).to(tl.float32)
