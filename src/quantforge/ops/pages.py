"""Pages in torch: codes to and from the layout of `numerics.pages`, and the lookup tables."""

from __future__ import annotations

import numpy as np
import torch

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.packing import planes
from quantforge.numerics.pages import (
    PageLayout,
    bit_maps,
    scale_order,
    symbols,
)
from quantforge.ops.constants import cached_constant
from quantforge.ops.tiles import unpack
from quantforge.spec import QuantSpec


@cached_constant
def _map(length: int, bits: int, plane: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return (code index, bit) of each bit of a row's plane, and where each code's bits are."""
    maps = bit_maps(length, bits)[plane]
    code, bit = (torch.from_numpy(t).to(device) for t in (maps.code, maps.bit))
    return code, bit.to(torch.uint8)


@cached_constant
def _symbols(bits: int, inverse: bool, device: torch.device) -> torch.Tensor:
    table = symbols(bits)
    return torch.from_numpy(np.argsort(table).astype(np.uint8) if inverse else table).to(device)


@cached_constant
def _scale_order(tokens: int, inverse: bool, device: torch.device) -> torch.Tensor:
    order = scale_order(tokens)
    return torch.from_numpy(np.argsort(order) if inverse else order).to(device)


@cached_constant
def scale_places(tokens: int, device: torch.device) -> torch.Tensor:
    """Return where the scale of each token stands in a page, (tokens,) int32."""
    return torch.from_numpy(np.argsort(scale_order(tokens)).astype(np.int32)).to(device)


@cached_constant
def _sources(length: int, bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each bit of each code its byte, counted over the planes of a row, and its bit."""
    byte = np.empty((length, bits), np.int64)
    position = np.empty((length, bits), np.uint8)
    start = 0
    for plane in bit_maps(length, bits):
        width = plane.code.shape[0]
        for j in range(width):
            for k in range(8):
                byte[plane.code[j, k], plane.bit[j, k]] = start + j
                position[plane.code[j, k], plane.bit[j, k]] = k
        start += width
    return torch.from_numpy(byte).to(device), torch.from_numpy(position).to(device)


def codes_of(packed: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Unpack rows (..., row_bytes) of `numerics.packing` into codes (..., dim)."""
    return unpack(packed, planes(dim, bits), dim)


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes (..., rows, n) into bytes (..., rows * n * bits / 8), plane after plane."""
    stored = _symbols(bits, False, codes.device)[codes.int()]
    parts = []
    for plane in range(2 if bits == 3 else 1):
        code, bit = _map(codes.shape[-1], bits, plane, codes.device)
        data = stored.new_zeros((*stored.shape[:-1], code.shape[0]))
        for position in range(8):
            field = (stored[..., code[:, position]] >> bit[:, position]) & 1
            data |= field << position
        parts.append(data.flatten(-2))
    return torch.cat(parts, -1)


def _unpack_rows(data: torch.Tensor, rows: int, length: int, bits: int) -> torch.Tensor:
    """Invert `_pack_rows`: bytes (..., rows * length * bits / 8) to codes (..., rows, length)."""
    widths = [length // 4, length // 8] if bits == 3 else [length * bits // 8]
    parts, start = [], 0
    for width in widths:
        parts.append(data[..., start : start + rows * width].unflatten(-1, (rows, width)))
        start += rows * width
    row = torch.cat(parts, -1)
    byte, position = _sources(length, bits, data.device)
    stored = row.new_zeros((*row.shape[:-1], length))
    for k in range(bits):
        stored |= ((row[..., byte[:, k]] >> position[:, k]) & 1) << k
    return _symbols(bits, True, data.device)[stored.int()]


def _with_scales(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Append fp16 scales (..., T) to the bytes of pages, in the order of the lanes."""
    ordered = scales[..., _scale_order(scales.shape[-1], False, scales.device)]
    return torch.cat([codes, ordered.contiguous().view(torch.uint8)], -1)


def key_pages(codes: torch.Tensor, scales: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Pack key codes (..., pages * T, D) and scales (..., pages * T) into (..., pages, bytes)."""
    codes = codes.unflatten(-2, (-1, layout.tokens))
    return _with_scales(
        _pack_rows(codes, layout.key_bits), scales.unflatten(-1, (-1, layout.tokens))
    )


def value_pages(codes: torch.Tensor, scales: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Pack value codes (..., pages * T, D) and scales (..., pages * T) into (..., pages, bytes)."""
    codes = codes.unflatten(-2, (-1, layout.tokens)).mT
    return _with_scales(
        _pack_rows(codes, layout.value_bits), scales.unflatten(-1, (-1, layout.tokens))
    )


def _split_page(pages: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    data, scales = pages[..., : -2 * tokens], pages[..., -2 * tokens :]
    stored = scales.contiguous().view(torch.float16)
    return data, stored[..., _scale_order(tokens, True, pages.device)]


def read_key_pages(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (..., pages * T, D) and scales (..., pages * T) of pages (..., pages, bytes)."""
    data, scales = _split_page(pages, layout.tokens)
    codes = _unpack_rows(data, layout.tokens, layout.key_dim, layout.key_bits)
    return codes.flatten(-3, -2), scales.flatten(-2)


def read_value_pages(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (..., pages * T, D) and scales (..., pages * T) of pages (..., pages, bytes)."""
    data, scales = _split_page(pages, layout.tokens)
    codes = _unpack_rows(data, layout.value_dim, layout.tokens, layout.value_bits)
    return codes.mT.flatten(-3, -2), scales.flatten(-2)


@cached_constant
def lookup_table(spec: QuantSpec, device: torch.device) -> torch.Tensor:
    """Return the (4, 32) int32 words of the fused kernel's lookup, each repeated for the lanes.

    Rows: low bytes of entries 0-3 and 4-7, then their high bytes. Entries are fp16 centroids, or
    their magnitudes at 4 bits; with the e4m3 codebook the "high" bytes are whole fp8 values.
    """
    entries = torch.from_numpy(codebook_of(spec).centroids)
    entries = entries[len(entries) // 2 :] if spec.bits == 4 else entries
    if spec.codebook == "e4m3":
        high = entries.to(torch.float8_e4m3fn).view(torch.uint8)
        low = torch.zeros_like(high)
    else:
        low, high = entries.to(torch.float16).view(torch.uint8).view(-1, 2).unbind(-1)
    low, high = (torch.nn.functional.pad(t, (0, 8 - len(t))) for t in (low, high))
    words = torch.cat([low, high]).contiguous().view(torch.int32)
    return words[:, None].expand(-1, 32).contiguous().to(device)
