"""The best of many scores per query, with their rows, in a fixed order.

A score and a row are one int64 that sorts as the tie rule says, so the order is total and any
sorting network gives the same result:

    key = ordered(score) << 32 | 0xFFFFFFFF - row         higher scores, then smaller rows, first

A program keeps the best `keep` keys of SPAN by a bitonic network; launches repeat until one program
per query is left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantforge.ops.launch import INTERPRET

MIN_SPAN = 1 if INTERPRET else 1024
"""Keys of a program; the interpreter takes two milliseconds for each."""


@triton.jit
def key_of(score, row):
    """Return the keys of float32 scores and int64 rows."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (4294967295 - row)


@triton.jit
def score_of(key):
    """Return the score of a key."""
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def row_of(key):
    """Return the row of a key, int64."""
    return 4294967295 - (key & 4294967295)


@triton.jit
def _best(
    source, keys, scores, rows, offsets, length, k,
    KEEP: tl.constexpr, SPAN: tl.constexpr, NUMBERED: tl.constexpr, LAST: tl.constexpr,
    OFFSETS: tl.constexpr,
):  # fmt: skip
    """Keep the best KEEP of SPAN; NUMBERED: the source is scores, numbered by position."""
    query = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    inside = place < length
    lowest = key_of(tl.full((SPAN,), float("-inf"), tl.float32), 4294967295)
    if NUMBERED:
        score = tl.load(source + query * length + place, mask=inside, other=float("-inf"))
        key = tl.where(inside, key_of(score, place.to(tl.int64)), lowest)
    else:
        key = tl.load(source + query * length + place, mask=inside, other=0)
        key = tl.where(inside, key, lowest)
    best = tl.topk(key, KEEP)
    i = tl.arange(0, KEEP)
    if LAST:
        score = score_of(best)
        row = tl.where(score == float("-inf"), -1, row_of(best))
        if OFFSETS:
            score += tl.load(offsets + query)
        tl.store(scores + query * k + i, score, mask=i < k)
        tl.store(rows + query * k + i, row, mask=i < k)
    else:
        kept = query * tl.num_programs(0) * KEEP + tl.program_id(0) * KEEP
        tl.store(keys + kept + i, best)


def _span(keep: int) -> int:
    """Return the keys that a program reads: a launch must shrink them."""
    return max(MIN_SPAN, 4 * keep)


def _reduce(source: torch.Tensor, keep: int, numbered: bool) -> torch.Tensor:
    """Run one launch that keeps `keep` keys of every span."""
    q, length = source.shape
    programs = -(-length // _span(keep))
    keys = torch.empty((q, programs * keep), dtype=torch.int64, device=source.device)
    _best[(programs, q)](
        source, keys, keys, keys, keys, length, keep, KEEP=keep, SPAN=_span(keep),
        NUMBERED=numbered, LAST=False, OFFSETS=False, num_warps=4,
    )  # fmt: skip
    return keys


def best_of_scores(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the best `keep` (a power of two) of scores (q, n) as sorted keys (q, keep)."""
    keys = _reduce(scores, keep, True)
    while keys.shape[1] > keep:
        keys = _reduce(keys, keep, False)
    return keys


def best_of_keys(
    keys: torch.Tensor, k: int, offsets: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best k of keys (q, n): scores plus offsets (q,), and rows, each (q, k)."""
    keep = max(16, triton.next_power_of_2(k))
    while keys.shape[1] > _span(keep):
        keys = _reduce(keys, keep, False)
    q, length = keys.shape
    scores = torch.empty((q, k), dtype=torch.float32, device=keys.device)
    rows = torch.empty((q, k), dtype=torch.int64, device=keys.device)
    _best[(1, q)](
        keys, keys, scores, rows, scores if offsets is None else offsets, length, k,
        KEEP=keep, SPAN=_span(keep), NUMBERED=False, LAST=True, OFFSETS=offsets is not None,
        num_warps=4,
    )  # fmt: skip
    return scores, rows
