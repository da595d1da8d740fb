"""Vectors to codes and back, and scores on codes, in torch: `numerics.vectors` says what they are.

Directions with equal bits are one packed array that the `scores` operator reads:

    scores = <q, x>  =  sum over groups of scores(G p, packed[group], scales) + offsets

The operator rotates its queries, and the codes of a group are rotated already: so queries are
rotated back first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantforge.errors import InputError
from quantforge.numerics.packing import row_bytes
from quantforge.numerics.vectors import VectorCode, plain_spec
from quantforge.ops.constants import centroids
from quantforge.ops.dequantize.api import dequantize
from quantforge.ops.lookup import take
from quantforge.ops.quantize.eager import nearest, pack_columns
from quantforge.ops.scores.api import scores
from quantforge.ops.transform import rotate, unrotate
from quantforge.spec import QuantSpec

CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Coded:
    """Codes of n vectors.

    Attributes:
        packed: per group (n, row_bytes) uint8.
        scales: (n, 1) fp16.
        offsets: (n,) fp16 in the unit of the codec, <mean, r> or |r|^2.
    """

    packed: tuple[torch.Tensor, ...]
    scales: torch.Tensor
    offsets: torch.Tensor


class Codec:
    """The torch side of a `VectorCode`.

    Args:
        code: what was learned.
        seed: of the rotations inside of the operators.
        squared: offsets are |r|^2 (for distances) instead of <mean, r>.
    """

    def __init__(self, code: VectorCode, seed: int, *, squared: bool) -> None:
        self.code, self.seed, self.squared = code, seed, squared
        self.groups: list[tuple[QuantSpec, slice]] = [
            (plain_spec(where.stop - where.start, bits, seed), where) for bits, where in code.groups
        ]
        self.mean, self.forward, self.dual, self.weights, self.errors = (
            torch.from_numpy(part).to(torch.float32)
            for part in (code.mean, code.forward, code.dual, code.weights, code.error_weights)
        )
        variance = float(((code.step[:, None] * code.basis * code.equalizer) ** 2).sum())
        length = float((code.mean**2).sum()) ** 0.5
        self.unit = variance if squared else length * variance**0.5 or 1.0

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector: codes, scale and offset."""
        return sum(row_bytes(spec.dim, spec.bits) for spec, _ in self.groups) + 4

    @property
    def nbytes(self) -> int:
        """Bytes of what the code itself holds, as tensors here."""
        parts = (self.mean, self.forward, self.dual, self.weights, self.errors)
        return sum(part.nbytes for part in parts)

    def empty(self) -> Coded:
        """Return the codes of no vectors."""
        packed = [
            torch.empty(0, row_bytes(s.dim, s.bits), dtype=torch.uint8) for s, _ in self.groups
        ]
        half = torch.float16
        return Coded(tuple(packed), torch.empty(0, 1, dtype=half), torch.empty(0, dtype=half))

    def encode(self, x: torch.Tensor) -> Coded:
        """Encode finite vectors (n, dim).

        Raises:
            InputError: for a vector whose scale or offset is beyond fp16.
        """
        parts = [self._encode(chunk) for chunk in x.split(CHUNK_ROWS)] or [self.empty()]
        packed = tuple(torch.cat(group) for group in zip(*(p.packed for p in parts), strict=True))
        scales = torch.cat([p.scales for p in parts])
        offsets = torch.cat([p.offsets for p in parts])
        bad = ~(scales[:, 0].isfinite() & offsets.isfinite())
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise InputError(
                f"vector {row} has norm {float(x[row].double().norm()):.3g}, too large for the "
                "fp16 numbers stored with it; train on data of this size, or rescale it"
            )
        return Coded(packed, scales, offsets)

    def _encode(self, x: torch.Tensor) -> Coded:
        r = x.to(torch.float32) - self.mean
        u = r @ self.forward.T
        energy = (self.weights * u * u).sum(-1)
        g = (energy / self.weights.sum()).sqrt()
        v = u / torch.where(g > 0, g, 1.0).unsqueeze(-1)
        agreement, packed = torch.zeros_like(g), []
        for spec, where in self.groups:
            codes = nearest(v[:, where].contiguous(), spec)
            table = centroids(spec, x.device)
            c = take(table, codes.flatten().to(torch.int32)).view(codes.shape)
            agreement += (self.weights[where] * u[:, where] * c).sum(-1)
            rows = torch.zeros(len(x), row_bytes(spec.dim, spec.bits), dtype=torch.uint8)
            pack_columns(codes.T.contiguous(), spec.bits, rows)
            packed.append(rows)
        scales = torch.where(agreement > 0, energy / agreement, 0.0)
        offsets = (r * r).sum(-1) if self.squared else r @ self.mean
        half = torch.float16
        return Coded(tuple(packed), scales.unsqueeze(-1).to(half), (offsets / self.unit).to(half))

    def decode(self, coded: Coded) -> torch.Tensor:
        """Decode vectors (n, dim), float32."""
        c = torch.zeros(len(coded.scales), len(self.mean))
        for (spec, where), packed in zip(self.groups, coded.packed, strict=True):
            c[:, where] = rotate(dequantize(packed, coded.scales, spec), spec, spec.seed)
        return self.mean + c @ self.dual

    def project(self, query: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return queries (q, dim) as groups take them, and their standard errors at scale 1."""
        turned = (query.to(torch.float32) - self.mean) @ self.dual.T
        error = (turned.square() * self.errors).sum(-1).sqrt()
        return [unrotate(turned[:, where], spec, spec.seed) for spec, where in self.groups], error

    def products(self, projected: list[torch.Tensor], coded: Coded) -> torch.Tensor:
        """Return <q - mean, r> of projected queries with coded vectors, (q, n) float32."""
        total = torch.zeros(len(projected[0]), len(coded.scales))
        for (spec, _), query, packed in zip(self.groups, projected, coded.packed, strict=True):
            total += scores(query, packed, coded.scales, spec)
        return total
