"""What a mixed search is given besides codes and queries: where to look, and what to leave out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantforge.numerics.integers import integer_table
from quantforge.numerics.packing import planes
from quantforge.ops.constants import cached_constant
from quantforge.ops.tiles import Decoder, make_decoder, tiles
from quantforge.spec import QuantSpec

ROUND_UP = 1 + 2.0**-10
TINY_HALF = 6e-8


@dataclass(frozen=True, eq=False)
class Visits:
    """Rows that queries look at: range r is visited by `queries[starts[r] : starts[r + 1]]`.

    Attributes:
        ranges: (r, 2) int64 on the CPU, first row and the row after the last.
        starts: (r + 1,) int64 on the CPU, rising from 0.
        queries: (v,) int64, distinct within a range.
    """

    ranges: torch.Tensor
    starts: torch.Tensor
    queries: torch.Tensor


@dataclass(frozen=True, eq=False)
class Bounds:
    """What tells, after the first groups, how much the others may add.

        |sum of z t over the others|  <=  |z / steps| |steps t|  =  |z / steps| rests

    Attributes:
        lead: groups that are multiplied for every row.
        steps: (dim,) float32 above 0, the sizes of the directions; any are right, good ones are
            nearly proportional to the data.
        rests: (n,) float16, rounded up.
    """

    lead: int
    steps: torch.Tensor
    rests: torch.Tensor


@cached_constant
def integer_decoder(spec: QuantSpec, device: torch.device) -> Decoder:
    """Return the lookup of a spec's integers, as float32."""
    values = torch.from_numpy(integer_table(spec).values).to(torch.float32)
    return make_decoder(planes(spec.dim, spec.bits), spec.dim, values, device)


def slices(specs: tuple[QuantSpec, ...]) -> list[slice]:
    """Return the directions of each group."""
    found, start = [], 0
    for spec in specs:
        found.append(slice(start, start + spec.dim))
        start += spec.dim
    return found


def rests_of(
    packed: tuple[torch.Tensor, ...], specs: tuple[QuantSpec, ...], steps: torch.Tensor, lead: int
) -> torch.Tensor:
    """Return `Bounds.rests` (n,) of rows.

    Args:
        packed: per group (n, row_bytes) uint8.
        specs: per group.
        steps: (dim,) float32, at most 1 among the groups from `lead` on.
        lead: the groups before are not counted.
    """
    total = torch.zeros(packed[0].shape[0], device=packed[0].device)
    groups = list(zip(packed, specs, slices(specs), strict=True))[lead:]
    for rows, spec, where in groups:
        decoder = integer_decoder(spec, rows.device)
        weight = (steps[where] * float(integer_table(spec).unit)).square()
        weight = torch.nn.functional.pad(weight, (0, 1))[decoder.order]
        for tile in tiles(rows, spec.dim):
            total[tile] += decoder(rows[tile]).square_() @ weight
    return (total.sqrt() * ROUND_UP + TINY_HALF).to(torch.float16)
