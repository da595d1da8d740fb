"""linear: `F.linear` of a few tokens with packed weights, on the layers of Llama-3-8B."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

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
from quantforge import QuantSpec, QuantTensor


@dataclass(frozen=True)
class Linear:
    """Tokens (B, 1, in) times packed weights (out, in)."""

    layer: str
    batch: int
    in_features: int
    out_features: int
    bits: int
    dtype: torch.dtype
    quick: bool = False

    @property
    def spec(self) -> QuantSpec:
        """The code of weight rows."""
        return QuantSpec(self.in_features, self.bits)


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
LAYERS = {
    "q_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "down_proj": (14336, 4096),
    "lm_head": (4096, 128256),
}
SHAPES: dict[Size, tuple[Linear, ...]] = {
    "cuda": tuple(
        Linear(layer, batch, *sizes, 4, BFLOAT16, quick=(layer, batch) == ("gate_proj", 1))
        for layer, sizes in LAYERS.items()
        for batch in (1, 8, 32)
    ),
    "cpu": (Linear("4096x4096", 1, 4096, 4096, 4, FLOAT32, quick=True),),
    "small": (Linear("64x48", 2, 64, 48, 4, FLOAT32),),
}


def _make(case: Linear, device: torch.device) -> Contenders:
    def weights(seed: int) -> torch.Tensor:
        return normal((case.out_features, case.in_features), case.dtype, device, seed).mul_(0.02)

    def packed(seed: int) -> QuantTensor:
        parts = pack(weights(seed), case.spec)
        return QuantTensor(*parts, case.spec, dtype=case.dtype)

    x = normal((case.batch, 1, case.in_features), case.dtype, device, seed=1000)
    codes = rotated(packed, case.out_features * row_nbytes(case.spec), device)
    dense_bytes = dense_nbytes((case.out_features, case.in_features), case.dtype)
    dense = rotated(weights, dense_bytes, device)
    kind = str(case.dtype).removeprefix("torch.")
    return Contenders(
        [partial(F.linear, x, w) for w in codes],
        {f"{kind} linear": [partial(F.linear, x, w) for w in dense]},
        f"{kind} linear",
        2 * code_error(case.bits),
    )


def cases(size: Size) -> list[Case]:
    """Return the cases; bytes are weights read once, tokens read, outputs written."""
    kind = "cuda" if size == "cuda" else "cpu"
    result = []
    for case in SHAPES[size]:
        packed = case.out_features * row_nbytes(case.spec)
        dense = dense_nbytes((case.out_features, case.in_features), case.dtype)
        ends = dense_nbytes((case.batch, case.in_features + case.out_features), case.dtype)
        result.append(
            Case(
                "linear",
                f"{case.layer} B={case.batch} {case.bits} bits",
                {
                    "layer": case.layer,
                    "in": case.in_features,
                    "out": case.out_features,
                    "batch": case.batch,
                    "bits": case.bits,
                },
                packed + ends,
                2 * case.batch * case.in_features * case.out_features,
                rotation_bytes(dense, kind) + rotation_bytes(packed, kind) + 2 * dense,
                partial(_make, case),
                case.quick,
            )
        )
    return result
