"""Shapes and calls shared by quantize and dequantize: keys of a prompt, and embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import log2

import torch

from benchmarks.cases.inputs import (
    Packed,
    dense_nbytes,
    normal,
    pack,
    rotated,
    rotation_bytes,
    row_nbytes,
)
from benchmarks.registry import Calls, Size
from quantforge.spec import QuantSpec

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Vectors:
    """Vectors (..., dim) to code.

    Attributes:
        lead: (n,), or (B, Hkv, n) for keys, which have a shift and an equalizer per head.
        dim: numbers per vector.
        bits: per number.
        dtype: of the dense vectors.
        quick: whether `--quick` measures it.
    """

    lead: tuple[int, ...]
    dim: int
    bits: int
    dtype: torch.dtype
    quick: bool = False

    @property
    def spec(self) -> QuantSpec:
        """The code: norm-preserving for keys, as `QuantForgeCache` has it."""
        return QuantSpec(self.dim, self.bits, scale_rule="norm" if self.is_kv else "unbiased")

    @property
    def is_kv(self) -> bool:
        """Whether these are keys."""
        return len(self.lead) > 1

    @property
    def name(self) -> str:
        """Name of the case."""
        shape = "x".join(str(n) for n in (*self.lead, self.dim))
        return f"{shape} {str(self.dtype).removeprefix('torch.')} {self.bits} bits"

    @property
    def shape(self) -> dict[str, object]:
        """What the tables show."""
        return {
            "what": "keys" if self.is_kv else "embeddings",
            "vectors": "x".join(str(n) for n in self.lead),
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bits": self.bits,
        }

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense vectors."""
        return dense_nbytes((*self.lead, self.dim), self.dtype)

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and scales."""
        return dense_nbytes(self.lead, torch.uint8) * row_nbytes(self.spec)

    @property
    def nbytes(self) -> int:
        """Bytes read and written: dense vectors on one side, codes and scales on the other."""
        return self.dense_bytes + self.packed_bytes

    @property
    def flops(self) -> int:
        """A butterfly of log2(dim) stages, and scaling by sign, equalizer and norm."""
        numbers = self.dense_bytes // self.dtype.itemsize
        return round(numbers * (log2(self.dim) + 3))

    def memory(self, device: str) -> int:
        """Bytes of all input sets, and of the outputs of both contenders."""
        return 2 * rotation_bytes(self.dense_bytes, device) + 3 * self.nbytes

    def statistics(self, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return shift and equalizer: per head for keys, none for embeddings."""
        if not self.is_kv:
            return None, None
        shape = (*self.lead[:-1], 1, self.dim)
        shift = normal(shape, FLOAT32, device, seed=1000)
        return shift, normal(shape, FLOAT32, device, seed=1001).abs_().clamp_(0.1, 1.0)

    def dense(self, device: torch.device) -> list[torch.Tensor]:
        """Return the input sets."""
        shape = (*self.lead, self.dim)
        return rotated(
            lambda seed: normal(shape, self.dtype, device, seed), self.dense_bytes, device
        )

    def packed(self, device: torch.device) -> list[Packed]:
        """Return the same vectors as codes and scales."""
        shape = (*self.lead, self.dim)
        return rotated(
            lambda seed: pack(normal(shape, self.dtype, device, seed), self.spec),
            self.packed_bytes,
            device,
        )


SHAPES: dict[Size, tuple[Vectors, ...]] = {
    "cuda": (
        Vectors((1, 8, 131072), 128, 4, BFLOAT16, quick=True),
        Vectors((8, 8, 32768), 128, 4, BFLOAT16),
        Vectors((1, 8, 131072), 128, 3, BFLOAT16),
        Vectors((1, 8, 131072), 128, 2, BFLOAT16),
        Vectors((1, 8, 131072), 128, 8, BFLOAT16),
        Vectors((8, 8, 64), 128, 4, BFLOAT16),
        Vectors((1, 8, 131072), 64, 4, BFLOAT16),
        Vectors((1 << 20,), 768, 4, BFLOAT16, quick=True),
        Vectors((1 << 20,), 768, 4, FLOAT32),
        Vectors((1 << 20,), 768, 2, BFLOAT16),
        Vectors((1 << 19,), 1536, 4, BFLOAT16, quick=True),
        Vectors((1 << 19,), 1536, 4, FLOAT32),
    ),
    "cpu": (
        Vectors((1, 8, 4096), 128, 4, FLOAT32, quick=True),
        Vectors((33_333,), 384, 4, FLOAT32, quick=True),
        Vectors((33_333,), 384, 2, FLOAT32),
        Vectors((16_666,), 768, 4, FLOAT32),
    ),
    "small": (
        Vectors((1, 2, 40), 64, 4, FLOAT32),
        Vectors((50,), 96, 3, BFLOAT16),
    ),
}


def copies(x: list[torch.Tensor]) -> dict[str, Calls]:
    """Return what moves as many dense numbers without coding them."""
    return {
        "copy": [t.clone for t in x],
        "fp8 cast": [partial(t.to, torch.float8_e4m3fn) for t in x],
    }
