"""Search in two stages without the vectors: the cheap bits of all rows, all bits of the survivors.

The first stage reads the leading groups of a code (loud directions), or the upper plane of a group
whose codes are stored in more than one:

    full = first + rest        rest ~ scale * N(0, sum over groups of |q_g|^2 v_g)

with v the variance of what the first stage does not see of a coordinate of unit variance. A row
survives if

    first + z * sigma >= T     sigma = scale * sqrt(sum |q_g|^2 v_g)

where T is the k-th best full score of the rows that looked best: at most that of all rows. A row of
the k best is lost if (T - first) / sigma is above z. Neighbours have rests far above those of other
rows, so no quantile of the normal distribution will do: z is the quantile, at the recall asked for,
of (T - first) / sigma of the k best rows of sample queries. That sample also tells what each first
stage would cost in bytes, and the cheapest is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from quantforge.errors import InputError
from quantforge.numerics.codebook import load_codebook
from quantforge.numerics.packing import planes, row_bytes
from quantforge.numerics.vectors import distortions, plain_spec
from quantforge.ops.scores.api import scores
from quantforge.ops.transform import unrotate
from quantforge.spec import QuantSpec
from quantforge.vectordb.codec import Codec, Coded

FIRST = 4
"""So many rows, times k, are scored in full to find T."""
STATE_BYTES = 4
"""Scale and offset of a row, read in the first stage."""

Full = Callable[[torch.Tensor], torch.Tensor]
"""Returns the full scores (m,) of rows (m,) for one query."""


@dataclass(frozen=True)
class Piece:
    """What the first stage reads of one group.

    Attributes:
        group: its place in the code.
        spec: of the bytes read.
        start, stop: these bytes.
        gain: factor of the scores of these bytes.
    """

    group: int
    spec: QuantSpec
    start: int
    stop: int
    gain: float


@dataclass(frozen=True)
class FirstStage:
    """A way to score rows by a part of their bytes.

    Attributes:
        pieces: what is read.
        unseen: (groups,) variance of what is not seen, for each group.
        nbytes: read of each row, scale and offset included.
    """

    pieces: tuple[Piece, ...]
    unseen: tuple[float, ...]
    nbytes: int

    @property
    def lead(self) -> int | None:
        """How many groups are read, or None if one of them is read in part."""
        whole = all(self.unseen[piece.group] == 0 for piece in self.pieces)
        return len(self.pieces) if whole else None

    def scores(self, codec: Codec, query: torch.Tensor, coded: Coded) -> torch.Tensor:
        """Return what is seen of the scores (q, n) of queries (q, dim), without the base."""
        turned = _turned(codec, query)
        total = coded.offsets.float() * codec.unit
        for piece in self.pieces:
            packed = coded.packed[piece.group][:, piece.start : piece.stop].contiguous()
            _, where = codec.groups[piece.group]
            own = piece.gain * unrotate(turned[:, where], piece.spec, codec.seed)
            total = total + scores(own, packed, coded.scales, piece.spec)
        return total

    def deviation(self, codec: Codec, query: torch.Tensor) -> torch.Tensor:
        """Return the standard deviation (q,) of what is not seen, at scale 1."""
        turned, lost = _turned(codec, query), torch.zeros(len(query), device=query.device)
        for (_, where), variance in zip(codec.groups, self.unseen, strict=True):
            lost += variance * turned[:, where].square().sum(-1)
        return lost.sqrt()


def _turned(codec: Codec, query: torch.Tensor) -> torch.Tensor:
    seen = 2 * (query - codec.mean) if codec.squared else query
    return seen @ codec.dual.T


@dataclass(frozen=True)
class Plan:
    """A first stage, and how far a row may seem to be behind and still survive.

    Attributes:
        stage: what is read first.
        z: the margin, in standard deviations of what is not seen.
        recall: expected share of the one-stage result that is found.
        share: of all bytes that is read, in the sample.
    """

    stage: FirstStage
    z: float
    recall: float
    share: float


def first_stages(codec: Codec) -> list[FirstStage]:
    """Return the first stages that a code allows, cheapest first."""
    specs = [spec for spec, _ in codec.groups]
    whole = [row_bytes(spec.dim, spec.bits) for spec in specs]
    kept = [float(1 - distortions()[spec.bits]) for spec in specs]
    pieces = [
        Piece(i, spec, 0, size, 1.0)
        for i, (spec, size) in enumerate(zip(specs, whole, strict=True))
    ]
    found = []
    for lead in range(len(specs)):
        upper = _upper_plane(lead, specs[lead], codec.seed)
        if upper is not None:
            piece, left = upper
            unseen = (*(0.0 for _ in range(lead)), left, *kept[lead + 1 :])
            size = sum(whole[:lead]) + piece.stop - piece.start + STATE_BYTES
            found.append(FirstStage((*pieces[:lead], piece), unseen, size))
        if lead + 1 < len(specs):
            unseen = (*(0.0 for _ in range(lead + 1)), *kept[lead + 1 :])
            size = sum(whole[: lead + 1]) + STATE_BYTES
            found.append(FirstStage(tuple(pieces[: lead + 1]), unseen, size))
    return found


def _upper_plane(group: int, spec: QuantSpec, seed: int) -> tuple[Piece, float] | None:
    """Return the upper plane of a group, and the variance that it leaves; None if it has one."""
    parts = planes(spec.dim, spec.bits)
    if len(parts) == 1:
        return None
    width, start = parts[-1].width, parts[-1].offset
    short = plain_spec(spec.dim, width, seed)
    fine, coarse = (_table(spec.dim, bits) for bits in (spec.bits, width))
    seen = np.repeat(coarse, 1 << (spec.bits - width))
    chance = _chances(spec)
    gain = float((chance * fine * seen).sum() / (chance * seen**2).sum())
    left = float((chance * (fine - gain * seen) ** 2).sum())
    stop = start + row_bytes(spec.dim, width)
    return Piece(group, short, start, stop, gain), left


def _table(dim: int, bits: int) -> np.ndarray:
    return load_codebook("gaussian", bits, dim).centroids.astype(np.float64)


def _chances(spec: QuantSpec) -> np.ndarray:
    """Return how often each code of a normal coordinate is taken."""
    borders = load_codebook("gaussian", spec.bits, spec.dim).boundaries.astype(np.float64)
    below = torch.special.ndtr(torch.from_numpy(borders)).numpy()
    return np.diff(np.concatenate([[0.0], below, [1.0]]))


def plan(
    codec: Codec,
    coded: Coded,
    query: torch.Tensor,
    full: torch.Tensor,
    k: int,
    recall: float,
    *,
    whole: bool = False,
) -> Plan:
    """Choose first stage and margin by sample queries.

    Args:
        codec: of the rows.
        coded: rows (n,), a sample of them if there are many.
        query: (q, dim) like those to come, say 100 of them.
        full: (q, n) scores without the base; -inf for a row that is the query itself.
        k: neighbours wanted.
        recall: share of them that may not be lost, below 1.
        whole: prefer stages that read whole groups, if there are any.

    Raises:
        InputError: for a code whose bytes cannot be read in part, or fewer rows than k.
    """
    if not 0 < recall < 1:
        raise InputError(f"the recall of two stages must be between 0 and 1; got {recall}")
    if full.shape[1] < k or not len(full):
        raise InputError(f"two stages are planned on at least k={k} rows; got {full.shape[1]}")
    stages = first_stages(codec)
    if not stages:
        raise InputError(
            f"a code of {codec.groups[0][0].bits} bits in one plane has no cheap part; use "
            'mode="adapted", or 3, 5, 6 or 7 bits'
        )
    if whole:
        stages = [stage for stage in stages if stage.lead is not None] or stages
    best = full.topk(k, dim=1)
    scales = coded.scales[:, 0].float()
    plans = []
    for stage in stages:
        first = stage.scores(codec, query, coded)
        sigma = stage.deviation(codec, query)[:, None] * scales
        border = best.values[:, -1:]
        behind = (border - first.gather(1, best.indices)) / sigma.gather(1, best.indices)
        z = float(torch.quantile(behind.nan_to_num(0.0).flatten(), recall, interpolation="higher"))
        passing = first + z * sigma >= border
        row_bytes = codec.row_bytes
        share = stage.nbytes / row_bytes + float(passing.float().mean())
        plans.append(Plan(stage, z, recall, share))
    return min(plans, key=lambda plan: plan.share)


def survivors(
    first: torch.Tensor, sigma: torch.Tensor, z: float, k: int, full: Full
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows (m,) of one query that survive, rising, and their full scores.

    Args:
        first: (n,) scores of the first stage.
        sigma: (n,) standard deviations of what it does not see.
        z: the margin.
        k: neighbours wanted.
        full: scores rows in full.
    """
    hopeful = first + z * sigma
    looked = first.topk(min(FIRST * k, len(first))).indices
    least = full(looked).topk(min(k, len(looked))).values[-1]
    passing = hopeful >= least
    passing[looked] = True
    rows = passing.nonzero()[:, 0]
    return rows, full(rows)
