"""cache_append: quantize one token, or a page of them, into preallocated buffers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.cases.inputs import dense_nbytes, normal, rotated, rotation_bytes, row_nbytes
from benchmarks.registry import Case, Contenders, Size
from quantforge.numerics.packing import packed_width
from quantforge.ops.cache_append import op
from quantforge.spec import QuantSpec


@dataclass(frozen=True)
class Append:
    """Tokens (B, Hkv, n, dim) to append to buffers of `capacity` rows."""

    batch: int
    kv_heads: int
    tokens: int
    capacity: int
    dim: int
    bits: int
    dtype: torch.dtype
    quick: bool = False

    @property
    def spec(self) -> QuantSpec:
        """The code of keys."""
        return QuantSpec(self.dim, self.bits, scale_rule="norm")


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
SHAPES: dict[Size, tuple[Append, ...]] = {
    "cuda": (
        Append(8, 8, 1, 4096, 128, 4, BFLOAT16, quick=True),
        Append(64, 8, 1, 4096, 128, 4, BFLOAT16),
        Append(8, 8, 64, 4096, 128, 4, BFLOAT16, quick=True),
        Append(8, 8, 64, 4096, 128, 2, BFLOAT16),
        Append(1, 8, 8192, 32768, 128, 4, BFLOAT16),
    ),
    "cpu": (
        Append(1, 8, 1, 4096, 128, 4, FLOAT32, quick=True),
        Append(1, 8, 64, 4096, 128, 4, FLOAT32),
    ),
    "small": (Append(2, 2, 3, 16, 64, 4, FLOAT32),),
}


def _make(case: Append, device: torch.device) -> Contenders:
    lead, spec = (case.batch, case.kv_heads), case.spec
    position = torch.tensor(case.capacity // 2, device=device)
    rows = position + torch.arange(case.tokens, device=device)
    shift = normal((*lead, 1, case.dim), FLOAT32, device, seed=1000)
    equalizer = normal((*lead, 1, case.dim), FLOAT32, device, seed=1001).abs_().clamp_(0.1, 1.0)

    def tokens(seed: int) -> torch.Tensor:
        """Tokens as a model has them: heads are the transposed third axis."""
        x = normal((case.batch, case.tokens, case.kv_heads, case.dim), case.dtype, device, seed)
        return x.transpose(1, 2)

    def ours(seed: int) -> partial[None]:
        packed = torch.zeros(
            (*lead, case.capacity, packed_width(spec)), dtype=torch.uint8, device=device
        )
        scales = torch.zeros((*lead, case.capacity, 1), dtype=torch.float16, device=device)
        x = tokens(seed)
        return partial(op.cache_append, packed, scales, x, position, shift, equalizer, spec.key)

    def dense(seed: int) -> partial[torch.Tensor]:
        buffer = torch.zeros((*lead, case.capacity, case.dim), dtype=case.dtype, device=device)
        return partial(buffer.index_copy_, 2, rows, tokens(seed))

    n = case.batch * case.kv_heads * case.capacity
    return Contenders(
        rotated(ours, n * row_nbytes(spec), device),
        {"index_copy": rotated(dense, n * case.dim * case.dtype.itemsize, device)},
    )


def cases(size: Size) -> list[Case]:
    """Return the cases; bytes are tokens read, their codes and scales written."""
    result = []
    for case in SHAPES[size]:
        kind = "cuda" if size == "cuda" else "cpu"
        vectors = case.batch * case.kv_heads * case.tokens
        buffers = case.batch * case.kv_heads * case.capacity
        dense = dense_nbytes((buffers, case.dim), case.dtype)
        shape = {
            "batch": case.batch,
            "kv_heads": case.kv_heads,
            "tokens": case.tokens,
            "dim": case.dim,
            "bits": case.bits,
        }
        result.append(
            Case(
                "cache_append",
                f"B={case.batch} Hkv={case.kv_heads} tokens={case.tokens} D={case.dim} "
                f"{case.bits} bits",
                shape,
                dense_nbytes((vectors, case.dim), case.dtype) + vectors * row_nbytes(case.spec),
                vectors * case.dim * (case.dim.bit_length() + 2),
                rotation_bytes(dense, kind) + rotation_bytes(buffers * row_nbytes(case.spec), kind),
                partial(_make, case),
                case.quick,
            )
        )
    return result
