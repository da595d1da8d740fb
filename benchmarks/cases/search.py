"""search: the best k of `query @ X^T`, against matmul and `topk` on uncompressed rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.cases.inputs import (
    dense_nbytes,
    normal,
    pack,
    rotated,
    rotation_bytes,
    row_nbytes,
)
from benchmarks.registry import Calls, Case, Contenders, Size
from quantforge.spec import QuantSpec

MAX_SCORES = 1 << 30
"""Scores that the baseline holds at once: 2 GiB of bfloat16."""
MAX_ROWS = 1 << 21
"""Rows it multiplies at once: fewer than 2**31 numbers, which not every matmul addresses."""
MAX_MISSED = 0.9
"""Neighbours among random vectors are hardly nearer than others, so 2 bits miss many."""


@dataclass(frozen=True)
class Search:
    """The best k of n packed rows for each query."""

    rows: int
    dim: int
    queries: int
    k: int
    bits: int
    dtype: torch.dtype
    quick: bool = False
    goal_ratio: float | None = None
    goal_share: float | None = None

    @property
    def spec(self) -> QuantSpec:
        """The code of embeddings."""
        return QuantSpec(self.dim, self.bits)


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
SHAPES: dict[Size, tuple[Search, ...]] = {
    "cuda": (
        Search(10_000_000, 768, 1, 10, 4, BFLOAT16, quick=True, goal_share=0.75),
        Search(10_000_000, 768, 1, 10, 2, BFLOAT16),
        Search(10_000_000, 768, 1, 100, 4, BFLOAT16),
        Search(10_000_000, 768, 32, 10, 4, BFLOAT16),
        Search(10_000_000, 768, 1024, 10, 4, BFLOAT16, quick=True, goal_ratio=1.0),
        Search(1_000_000, 1536, 1, 10, 4, BFLOAT16),
        Search(1_000_000, 1536, 1024, 10, 4, BFLOAT16),
    ),
    "cpu": (
        Search(100_000, 384, 1, 10, 4, FLOAT32, quick=True),
        Search(100_000, 384, 32, 10, 4, FLOAT32),
    ),
    "small": (Search(400, 64, 1, 5, 4, FLOAT32), Search(400, 64, 6, 5, 2, FLOAT32)),
}


def dense_search(
    query: torch.Tensor, rows: torch.Tensor, k: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and ids of the best k rows: a matmul and `topk` for each chunk of rows."""
    parts = []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        best, ids = (query @ part.mT).topk(min(k, len(part)))
        parts.append((best, ids + start))
    best, ids = (torch.cat(column, -1) for column in zip(*parts, strict=True))
    best, position = best.topk(k)
    return best, ids.gather(-1, position)


def vector_search(
    query: torch.Tensor, rows: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and ids of the best k rows for one query, by matrix-vector products."""
    best, ids = torch.cat([torch.mv(part, query) for part in rows.split(MAX_ROWS)]).topk(k)
    return best, ids


def missed(result: tuple[torch.Tensor, torch.Tensor], exact: tuple) -> float:
    """Return the share of the right ids that are not among the ids found: 1 - recall."""
    found, right = result[1], exact[1]
    hits = sum(
        int((part[:, :, None] == want[:, None, :]).any(-1).sum())
        for part, want in zip(found.split(64), right.split(64), strict=True)
    )
    return 1 - hits / right.numel()


def packed_search(query: torch.Tensor, parts: tuple, spec: QuantSpec, k: int) -> Any:
    """Return scores and ids by the fused operator."""
    from quantforge.ops import search  # the registry is read without it too

    return search(query, *parts, spec, k)


def _make(case: Search, device: torch.device) -> Contenders:
    def rows(seed: int) -> torch.Tensor:
        return normal((case.rows, case.dim), case.dtype, device, seed)

    query = normal((case.queries, case.dim), case.dtype, device, seed=1000)
    packed_bytes = case.rows * row_nbytes(case.spec)
    codes = rotated(lambda seed: pack(rows(seed), case.spec), packed_bytes, device)
    ours = [partial(packed_search, query, parts, case.spec, case.k) for parts in codes]
    dense = rotated(rows, dense_nbytes((case.rows, case.dim), case.dtype), device)
    kind = str(case.dtype).removeprefix("torch.")
    baselines: dict[str, Calls] = {}
    for share in (1, 8):  # large chunks, and chunks whose scores are read back sooner
        chunk = min(case.rows, MAX_ROWS, max(case.k, MAX_SCORES // share // case.queries))
        baselines[f"{kind} matmul + topk, {chunk} rows at a time"] = [
            partial(dense_search, query, x, case.k, chunk) for x in dense
        ]
    if case.queries == 1:
        baselines[f"{kind} matrix @ vector + topk"] = [
            partial(vector_search, query[0], x, case.k) for x in dense
        ]
    return Contenders(ours, baselines, next(iter(baselines)), MAX_MISSED, missed)


def cases(size: Size) -> list[Case]:
    """Return the cases; bytes are codes and scales read once, queries read, results written."""
    kind = "cuda" if size == "cuda" else "cpu"
    result = []
    for case in SHAPES[size]:
        packed = case.rows * row_nbytes(case.spec)
        dense = dense_nbytes((case.rows, case.dim), case.dtype)
        results = case.queries * case.k * 12  # fp32 score, int64 id
        result.append(
            Case(
                "search",
                f"{case.queries} queries, top {case.k} of {case.rows}x{case.dim} {case.bits} bits",
                {
                    "rows": case.rows,
                    "dim": case.dim,
                    "queries": case.queries,
                    "k": case.k,
                    "bits": case.bits,
                },
                packed + dense_nbytes((case.queries, case.dim), case.dtype) + results,
                2 * case.queries * case.rows * case.dim,
                rotation_bytes(dense, kind)
                + rotation_bytes(packed, kind)
                + 3 * 2 * min(MAX_SCORES, case.queries * case.rows)
                + 2 * dense // case.rows * min(case.rows, MAX_ROWS),
                partial(_make, case),
                case.quick,
                case.goal_ratio,
                case.goal_share,
            )
        )
    return result
