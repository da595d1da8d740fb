"""scores: `query @ X^T` over packed embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.cases.inputs import (
    code_error,
    dense_nbytes,
    normal,
    pack,
    rotated,
    rotation_bytes,
    row_nbytes,
)
from benchmarks.registry import Case, Contenders, Size
from quantforge.ops.scores import op
from quantforge.spec import QuantSpec


@dataclass(frozen=True)
class Scores:
    """Queries (q, dim) against n packed rows."""

    rows: int
    dim: int
    queries: int
    bits: int
    dtype: torch.dtype
    quick: bool = False

    @property
    def spec(self) -> QuantSpec:
        """The code of embeddings."""
        return QuantSpec(self.dim, self.bits)


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
SHAPES: dict[Size, tuple[Scores, ...]] = {
    "cuda": (
        *(Scores(1 << 20, 768, 1, bits, BFLOAT16, bits == 4) for bits in (1, 2, 3, 4, 8)),
        *(Scores(1 << 20, 768, n, 4, BFLOAT16, n == 1024) for n in (8, 32, 128, 1024, 4096)),
        Scores(1 << 20, 768, 1, 4, FLOAT32),
        Scores(1 << 20, 768, 32, 4, FLOAT32),
        Scores(1 << 19, 1536, 1, 4, BFLOAT16),
        Scores(1 << 19, 1536, 1024, 4, BFLOAT16),
    ),
    "cpu": (
        *(Scores(100_000, 384, 1, bits, FLOAT32, bits == 4) for bits in (2, 3, 4, 8)),
        Scores(100_000, 384, 32, 4, FLOAT32, quick=True),
    ),
    "small": (Scores(300, 64, 1, 4, FLOAT32), Scores(100, 96, 5, 3, BFLOAT16)),
}


def _make(case: Scores, device: torch.device) -> Contenders:
    def rows(seed: int) -> torch.Tensor:
        return normal((case.rows, case.dim), case.dtype, device, seed)

    query = normal((case.queries, case.dim), case.dtype, device, seed=1000)
    packed_bytes = case.rows * row_nbytes(case.spec)
    codes = rotated(lambda seed: pack(rows(seed), case.spec), packed_bytes, device)
    ours = [partial(op.scores, query, *parts, None, None, case.spec.key) for parts in codes]
    dense = rotated(rows, dense_nbytes((case.rows, case.dim), case.dtype), device)
    kind = str(case.dtype).removeprefix("torch.")
    baselines = {f"{kind} matmul": [partial(torch.matmul, query, x.mT) for x in dense]}
    if case.queries == 1:
        baselines[f"{kind} matrix @ vector"] = [partial(torch.mv, x, query[0]) for x in dense]
    return Contenders(ours, baselines, f"{kind} matmul", 2 * code_error(case.bits))


def cases(size: Size) -> list[Case]:
    """Return the cases; bytes are codes and scales read once, queries read, scores written."""
    kind = "cuda" if size == "cuda" else "cpu"
    result = []
    for case in SHAPES[size]:
        dtype = str(case.dtype).removeprefix("torch.")
        packed = case.rows * row_nbytes(case.spec)
        outputs = dense_nbytes((case.queries, case.rows), case.dtype)
        dense = dense_nbytes((case.rows, case.dim), case.dtype)
        result.append(
            Case(
                "scores",
                f"{case.queries} queries, {case.rows}x{case.dim} {dtype} {case.bits} bits",
                {
                    "rows": case.rows,
                    "dim": case.dim,
                    "queries": case.queries,
                    "dtype": dtype,
                    "bits": case.bits,
                },
                packed + dense_nbytes((case.queries, case.dim), case.dtype) + outputs,
                2 * case.queries * case.rows * case.dim,
                rotation_bytes(dense, kind) + rotation_bytes(packed, kind) + 3 * outputs,
                partial(_make, case),
                case.quick,
            )
        )
    return result
