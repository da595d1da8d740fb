"""Tile-wise access to packed rows: every eager reader of codes walks the rows through here.

Values are delivered in *packed order*, the channel order in which table lookups produce them. A
query is brought into that order together with its rotation, so nothing is shuffled per row:

    q . x  =  (E R q) . (scale * values)         R: rotation, E: channels in packed order

Codebook values come from tables indexed by one or two whole bytes of a row:

    bits 1, 2, 4, 8     one plane: a byte (or two, while a table entry stays <= 16 bytes)
    bits 3, 5, 6, 7     a byte of the widest plane | the fields of the other planes that belong
                        to the same channels, gathered into a second byte
    dim % 8 != 0        with several planes: codes are unpacked first

A table entry of 4, 8 or 16 bytes is one *element* of a wide dtype (int32, float64, complex128):
torch gathers elements about three times faster than rows (docs/LOG.md, 2026-11-23).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from quantforge.numerics.packing import Plane, planes, row_bytes
from quantforge.numerics.rotation import qjl_seed
from quantforge.ops import constants
from quantforge.ops.lookup import take
from quantforge.ops.transform import is_dense, rotate, unrotate
from quantforge.spec import QuantSpec

TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 21}
"""Decoded numbers per tile, all heads together: 2 MiB of float32 on CPU, 8 MiB on a GPU."""
_ELEMENT_BYTES = 16
_WIDE_DTYPES = {4: torch.int32, 8: torch.float64, 16: torch.complex128}


@dataclass(frozen=True, eq=False)
class Decoder:
    """Lookup from the planes of a row to codebook values.

    Attributes:
        planes: where the codes are, offsets counted from the start of a row.
        dim: codes per row.
        table: one entry per index, in a wide dtype; (entries,) or (entries, 2).
        values_per_entry: float32 values in one entry.
        index_bytes: data bytes of the widest plane that make one index; 0: unpack codes first.
        order: (width,) channel of each value; `dim` stands for padding.
    """

    planes: tuple[Plane, ...]
    dim: int
    table: torch.Tensor
    values_per_entry: int
    index_bytes: int
    order: torch.Tensor

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Decode rows (..., n, bytes) to float32 values (..., n, width)."""
        index = self._index(rows)
        entries = take(self.table, index.flatten())
        return entries.view(torch.float32).view(*rows.shape[:-1], self.order.shape[0])

    def _index(self, rows: torch.Tensor) -> torch.Tensor:
        base = _plane_bytes(rows, self.planes[0])
        if self.index_bytes == 2:
            return _aligned(base).view(torch.uint16).to(torch.int32)
        if self.index_bytes == 0:
            return unpack(rows, self.planes, self.dim).to(torch.int32)
        index = base.to(torch.int32)
        shift = 8
        for plane in self.planes[1:]:
            aligned = _align_fields(_plane_bytes(rows, plane), plane, self.planes[0])
            index |= aligned.to(torch.int32) << shift
            shift += plane.width
        return index


def _plane_bytes(rows: torch.Tensor, plane: Plane) -> torch.Tensor:
    return rows[..., plane.offset : plane.offset + plane.stride]


def _aligned(data: torch.Tensor) -> torch.Tensor:
    """Return bytes that can be viewed in pairs: contiguous from an even address on.

    Contiguous is not enough: such a tensor may start at an odd byte of its storage, and one that
    is empty or has a single row may have any strides.
    """
    *strides, last = data.stride()
    starts = (data.storage_offset(), *strides)
    if last == 1 and data.is_contiguous() and not any(start % 2 for start in starts):
        return data
    return data.clone(memory_format=torch.contiguous_format)


def _field_mask(plane: Plane, base: Plane) -> int:
    """Return the bits of a byte that hold the first of every `base.width / plane.width` fields."""
    return sum(plane.mask << position for position in range(0, 8, base.width))


def _align_fields(data: torch.Tensor, plane: Plane, base: Plane) -> torch.Tensor:
    """Return for each byte of `base` the fields of `plane` that hold the same channels.

    A byte of the narrow plane serves `base.width / plane.width` bytes of the wide one.
    """
    steps = range(0, base.width, plane.width)
    mask = _field_mask(plane, base)
    return torch.cat([(data >> step) & mask for step in steps], dim=-1)


def unpack(rows: torch.Tensor, layout: tuple[Plane, ...], dim: int) -> torch.Tensor:
    """Return the codes (..., dim) of rows, as `numerics.packing.unpack`."""
    codes = rows.new_zeros((*rows.shape[:-1], dim))
    for plane in layout:
        data = _plane_bytes(rows, plane)
        for slot in range(plane.fields):
            part = codes[..., slot * plane.stride : (slot + 1) * plane.stride]
            field = (data >> (slot * plane.width)) & plane.mask
            part |= field[..., : part.shape[-1]] << plane.shift
    return codes


def _codes_of_index(layout: tuple[Plane, ...], index_bytes: int) -> torch.Tensor:
    """Return the codes that an index stands for: (entries, codes)."""
    base = layout[0]
    index = torch.arange(1 << (8 if index_bytes == 1 and len(layout) == 1 else 16))
    codes = []
    for field in range(base.fields * index_bytes):
        code = (index >> (field * base.width)) & base.mask
        shift = 8
        for plane in layout[1:]:
            code |= ((index >> (shift + field * base.width)) & plane.mask) << plane.shift
            shift += plane.width
        codes.append(code)
    return torch.stack(codes, -1)


def make_decoder(
    layout: tuple[Plane, ...], dim: int, values: torch.Tensor, device: torch.device
) -> Decoder:
    """Return a lookup of any float32 values (2^bits,) of codes."""
    base = layout[0]
    entry_bytes = base.fields * values.element_size()
    if len(layout) > 1 and dim % 8:
        index_bytes, entries, channel = 0, values[:, None], torch.arange(dim)
    else:
        two = len(layout) == 1 and base.stride % 2 == 0 and 2 * entry_bytes <= _ELEMENT_BYTES
        index_bytes = 2 if two else 1
        entries = values[_codes_of_index(layout, index_bytes).clamp_max(len(values) - 1)]
        first = torch.arange(base.stride).view(-1, index_bytes, 1)
        channel = first + torch.arange(base.fields) * base.stride
    per_entry = entries.shape[1]
    element = min(per_entry * values.element_size(), _ELEMENT_BYTES)
    table = entries.contiguous().view(_WIDE_DTYPES[element])
    if table.shape[1] == 1:
        table = table.flatten()
    order = channel.flatten().clamp_max(dim)
    return Decoder(layout, dim, table.to(device), per_entry, index_bytes, order.to(device))


@dataclass(frozen=True, eq=False)
class Component:
    """One term of a decoded vector: `scales[column] * (E R)^T values`.

    A code has one component; the QJL residual adds a second, with signs for values.
    """

    spec: QuantSpec
    seeds: tuple[int, ...]
    column: int
    decoder: Decoder
    basis: torch.Tensor | None

    def project(self, query: torch.Tensor) -> torch.Tensor:
        """Bring float32 queries (..., dim) into packed order: (..., width)."""
        if self.basis is not None:
            return query @ self.basis.T
        for seed in self.seeds:
            query = rotate(query, self.spec, seed)
        return torch.nn.functional.pad(query, (0, 1)).index_select(-1, self.decoder.order)

    def unproject(self, values: torch.Tensor) -> torch.Tensor:
        """Bring float32 sums of values (..., width) back to vectors (..., dim)."""
        if self.basis is not None:
            return values @ self.basis
        x = values.new_zeros((*values.shape[:-1], self.spec.dim + 1))
        x = x.index_copy_(-1, self.decoder.order, values)[..., : self.spec.dim]
        for seed in reversed(self.seeds):
            x = unrotate(x, self.spec, seed)
        return x


def _make_component(
    spec: QuantSpec,
    layout: tuple[Plane, ...],
    values: torch.Tensor,
    seeds: tuple[int, ...],
    column: int,
    device: torch.device,
) -> Component:
    decoder = make_decoder(layout, spec.dim, values, device)
    basis = None
    if is_dense(spec, device):
        basis = torch.eye(spec.dim, device=device)
        for seed in seeds:
            basis = constants.rotation(spec, seed, device) @ basis
        basis = torch.nn.functional.pad(basis, (0, 0, 0, 1)).index_select(0, decoder.order)
    return Component(spec, seeds, column, decoder, basis)


@constants.cached_constant
def components(spec: QuantSpec, device: torch.device) -> tuple[Component, ...]:
    """Return the terms whose sum is a decoded vector (before equalizer and shift)."""
    layout = planes(spec.dim, spec.code_bits)
    values = constants.centroids(spec, torch.device("cpu"))
    code = _make_component(spec, layout, values, (spec.seed,), 0, device)
    if spec.estimator == "mse":
        return (code,)
    start = row_bytes(spec.dim, spec.code_bits)
    signs = tuple(Plane(p.width, p.shift, start + p.offset, p.stride) for p in planes(spec.dim, 1))
    seeds = (spec.seed, qjl_seed(spec.seed))
    return code, _make_component(spec, signs, torch.tensor([-1.0, 1.0]), seeds, 1, device)


def tiles(packed: torch.Tensor, width: int, *, columns_per_row: int = 0) -> Iterator[slice]:
    """Yield slices along the rows of packed (..., n, bytes) that bound the decoded memory.

    `width` numbers are decoded per row; `columns_per_row` numbers of work space (scores of all
    queries, say) are needed beside them for each row of all heads together.
    """
    heads = prod(packed.shape[:-2])
    per_row = max(heads * width, columns_per_row, 1)
    step = max(1, TILE_ELEMENTS[packed.device.type] // per_row)
    n = packed.shape[-2]
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
