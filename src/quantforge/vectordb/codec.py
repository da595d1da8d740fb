"""Vectors to codes and back, and scores on codes, in torch: `numerics.vectors` says what they are.

Directions with equal bits are one packed array that the `scores` operator reads. With c the centre
of a row (the data mean, or the centroid of its list) and r^ what the code stands for:

    ip, cosine   <q, x>    ~=  q.r^ + offset + q.c           offset = c.(r - r^)
    l2           -|q-x|^2  ~=  2 p.r^ + offset - |p - e|^2   offset = -2 e.r^ - |r|^2

where p = q - mean and e = c - mean. One projected query serves all lists; what depends on the list
is the base. The offset makes the inner product that of a query seen from c, with <c, r> exact.

The operator rotates its queries, and the codes of a group are rotated already: so queries are
rotated back first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantforge.errors import InputError
from quantforge.numerics.packing import row_bytes
from quantforge.numerics.vectors import (
    SEGMENT,
    Mode,
    VectorCode,
    plain_spec,
    segment_rotations,
)
from quantforge.ops.constants import cached_constant, centroids
from quantforge.ops.dequantize.api import dequantize
from quantforge.ops.lookup import take
from quantforge.ops.mixed_search.eager import Products
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
        offsets: (n,) fp16 in the unit of the codec.
    """

    packed: tuple[torch.Tensor, ...]
    scales: torch.Tensor
    offsets: torch.Tensor

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        packed = {f"packed{i}": part for i, part in enumerate(self.packed)}
        return {**packed, "scales": self.scales, "offsets": self.offsets}

    def to(self, device: torch.device) -> Coded:
        """Return the same on a device."""
        packed = tuple(part.to(device) for part in self.packed)
        return Coded(packed, self.scales.to(device), self.offsets.to(device))

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor]) -> Coded:
        """Take the codes from tensors by name."""
        count = sum(name.startswith("packed") for name in parts)
        packed = tuple(parts[f"packed{i}"] for i in range(count))
        return cls(packed, parts["scales"], parts["offsets"])


@dataclass(frozen=True)
class Queries:
    """Queries as codes take them.

    Attributes:
        turned: (q, width of all groups) float32, in the directions of the codes.
        base: (q, lists) float32, what the centre of each list adds to a score.
    """

    turned: torch.Tensor
    base: torch.Tensor

    def __getitem__(self, index: slice | torch.Tensor) -> Queries:
        return Queries(self.turned[index], self.base[index])


class Codec:
    """The torch side of a `VectorCode`.

    Args:
        code: what was learned.
        mode: how.
        seed: of the rotations inside of the operators.
        squared: scores are negative squared distances instead of inner products.
        centres: (lists, dim) float32; None for the mean alone.
    """

    def __init__(
        self,
        code: VectorCode,
        mode: Mode,
        seed: int,
        *,
        squared: bool,
        centres: torch.Tensor | None = None,
    ) -> None:
        self.code, self.mode, self.seed, self.squared = code, mode, seed, squared
        self.groups: list[tuple[QuantSpec, slice]] = [
            (plain_spec(where.stop - where.start, bits, seed), where) for bits, where in code.groups
        ]
        self.mean, self.forward, self.dual, self.weights, self.errors = (
            torch.from_numpy(part).to(torch.float32)
            for part in (code.mean, code.forward, code.dual, code.weights, code.errors)
        )
        self.centres = self.mean[None] if centres is None else centres
        self._anchors = self.centres - self.mean if squared else self.centres
        self._anchors_projected = self._anchors @ self.dual.T
        dual = self.dual[: self.groups[-1][1].stop]
        self._exact = torch.cat([dual, self._anchors]).to(torch.float64)
        self._parts = [len(dual), len(self._anchors)]
        self._anchor_lengths = self._anchors.to(torch.float64).square().sum(-1)
        variance = float(((code.step[:, None] * code.basis * code.equalizer) ** 2).sum())
        length = float(self.centres.square().sum(-1).mean()) ** 0.5
        self.unit = variance if squared else length * variance**0.5 or 1.0

    @property
    def device(self) -> torch.device:
        """Where codes are made and scored."""
        return self.mean.device

    def to(self, device: torch.device) -> None:
        """Move what is multiplied with vectors."""
        moved: dict[int, torch.Tensor] = {}  # some have two names
        for name, part in vars(self).items():
            if isinstance(part, torch.Tensor):
                setattr(self, name, moved.setdefault(id(part), part.to(device)))

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector: codes, scale and offset."""
        return sum(row_bytes(spec.dim, spec.bits) for spec, _ in self.groups) + 4

    @property
    def nbytes(self) -> int:
        """Bytes of what is held besides the codes."""
        held = [part for part in vars(self).values() if isinstance(part, torch.Tensor)]
        tensors = {part.data_ptr(): part.nbytes for part in held}
        return sum(tensors.values()) + self.code.nbytes

    def encode(self, x: torch.Tensor, lists: torch.Tensor | None = None) -> Coded:
        """Encode finite vectors (n, dim).

        Args:
            x: the vectors.
            lists: (n,) the centre of each; None for the first.

        Raises:
            InputError: for a vector whose scale or offset is beyond fp16.
        """
        lists = torch.zeros(len(x), dtype=torch.int64, device=x.device) if lists is None else lists
        chunks = zip(x.split(CHUNK_ROWS), lists.split(CHUNK_ROWS), strict=True)
        parts = [self._encode(*chunk) for chunk in chunks]
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

    def _encode(self, x: torch.Tensor, lists: torch.Tensor) -> Coded:
        r = x.to(torch.float32) - self.centres[lists]
        u = r @ self.forward.T
        energy = (self.weights * u * u).sum(-1)
        g = (energy / self.weights.sum()).sqrt()
        v = u / torch.where(g > 0, g, 1.0).unsqueeze(-1)
        agreement, packed = torch.zeros_like(g), []
        anchors = self._anchors_projected[lists]
        along = torch.zeros_like(g)
        for spec, where in self.groups:
            codes = nearest(v[:, where].contiguous(), spec)
            table = centroids(spec, x.device)
            c = take(table, codes.flatten().to(torch.int32)).view(codes.shape)
            agreement += (self.weights[where] * u[:, where] * c).sum(-1)
            along += (anchors[:, where] * c).sum(-1)
            size = row_bytes(spec.dim, spec.bits)
            rows = torch.zeros(len(x), size, dtype=torch.uint8, device=x.device)
            pack_columns(codes.T.contiguous(), spec.bits, rows)
            packed.append(rows)
        scales = torch.where(agreement > 0, energy / agreement, 0.0).to(torch.float16)
        along *= scales.float()
        if self.squared:
            offsets = -2 * along - r.square().sum(-1)
        else:
            offsets = (r * self._anchors[lists]).sum(-1) - along
        return Coded(tuple(packed), scales[:, None], (offsets / self.unit).to(torch.float16))

    def decode(self, coded: Coded, lists: torch.Tensor | None = None) -> torch.Tensor:
        """Decode vectors (n, dim), float32."""
        centres = self.centres[:1] if lists is None else self.centres[lists]
        return centres + self._decoded(coded) @ self.dual

    def _decoded(self, coded: Coded) -> torch.Tensor:
        """Return `scale c`, (n, dim) float32."""
        c = coded.scales.new_zeros(len(coded.scales), len(self.mean), dtype=torch.float32)
        for (spec, where), packed in zip(self.groups, coded.packed, strict=True):
            c[:, where] = rotate(dequantize(packed, coded.scales, spec), spec, spec.seed)
        return c

    def queries(self, x: torch.Tensor) -> Queries:
        """Return queries (q, dim) as `scores` takes them.

        Products are of float64, so that a query is the same in any batch.
        """
        seen = (2 * (x - self.mean) if self.squared else x).to(torch.float64)
        turned, base = (seen @ self._exact.T).split(self._parts, dim=1)
        if self.squared:
            own = seen.square().sum(-1) / 4
            base = base - own[:, None] - self._anchor_lengths
        return Queries(turned.to(torch.float32), base.to(torch.float32))

    def scores(self, queries: Queries, coded: Coded) -> torch.Tensor:
        """Return scores (q, n) float32 without the base; greater is better."""
        total = coded.offsets.float() * self.unit
        for (spec, where), packed in zip(self.groups, coded.packed, strict=True):
            query = unrotate(queries.turned[:, where], spec, spec.seed)
            total = total + scores(query, packed, coded.scales, spec)
        return total

    def integer_scores(self, queries: Queries, coded: Coded) -> torch.Tensor:
        """Return the same as `mixed_search` computes it, bit for bit."""
        products = Products(queries.turned, tuple(spec for spec, _ in self.groups))
        total = products.totals(list(coded.packed), slice(None))
        return total * coded.scales[:, 0].float() + coded.offsets.float() * self.unit

    def standard_errors(
        self, x: torch.Tensor, coded: Coded, lists: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the expected errors (q, n) of the scores of queries (q, dim) with rows."""
        decoded = self._decoded(coded)
        pull = self._unmix(self.weights * decoded)
        norm = pull.square() @ self.errors
        known = torch.where(norm > 0, 1 / norm, 0.0)
        scales = coded.scales[:, 0].float()
        found = torch.empty(len(x), len(decoded), device=x.device)
        labels = torch.zeros(len(decoded), dtype=torch.int64) if lists is None else lists.cpu()
        distinct, place = labels.unique(return_inverse=True)
        seen = self._unmix((x - self.mean) @ self.dual.T)
        centres = self._unmix((self.centres[distinct] - self.mean) @ self.dual.T)
        for i, centre in enumerate(centres):
            rows = (place == i).nonzero()[:, 0]
            p = seen - centre
            along = (p * self.errors) @ pull[rows].T
            variance = (p.square() @ self.errors)[:, None] - along.square() * known[rows]
            found[:, rows] = variance.clamp_min(0).sqrt() * scales[rows]
        return 2 * found if self.squared else found

    def _unmix(self, u: torch.Tensor) -> torch.Tensor:
        """Undo the rotation inside segments."""
        if self.mode != "adapted":
            return u
        whole, rest = _rotations(u.shape[1], self.seed, u.device)
        parts = u[:, : len(whole) * SEGMENT].unflatten(1, (-1, SEGMENT))
        found = (parts.transpose(0, 1) @ whole).transpose(0, 1).flatten(1)
        return torch.cat([found, u[:, len(whole) * SEGMENT :] @ rest], dim=1)


@cached_constant
def _rotations(dim: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotations of whole segments (s, SEGMENT, SEGMENT), and that of the last ones."""
    found = [
        torch.from_numpy(part).to(device, torch.float32) for _, part in segment_rotations(dim, seed)
    ]
    whole = found[: dim // SEGMENT]
    empty = torch.empty(0, SEGMENT, SEGMENT, device=device)
    rest = found[-1] if dim % SEGMENT else empty.new_empty(0, 0)
    return torch.stack(whole) if whole else empty, rest
