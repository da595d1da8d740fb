"""The groups of a mixed search as the C structures of source/search.cpp."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.integers import SPANS, integer_table, is_wide
from quantforge.spec import QuantSpec

_P, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
SHUFFLED = 16
"""Bytes that one shuffle looks up: shorter tables are repeated."""


class IntegerGroup(ctypes.Structure):
    """Codes of one group; see search.cpp."""

    _fields_ = (
        ("dim", _I32),
        ("bits", _I32),
        ("rows", _P),
        ("stride", _I64),
        ("table", _P),
        ("bias", _I32),
        ("most", _I32),
        ("room", _I32),
        ("span", _I32),
        ("unit", _F32),
    )


class SearchCall(ctypes.Structure):
    """What is searched; see search.cpp."""

    _fields_ = (
        ("groups", ctypes.POINTER(IntegerGroup)),
        ("count", _I32),
        ("lead", _I32),
        ("scales", _P),
        ("offsets", _P),
        ("rests", _P),
        ("unit", _F32),
        ("threads", _I32),
        ("steps", _P),
        ("bitmap", _P),
        ("query", _P),
        ("rows", _I64),
        ("queries", _I64),
        ("ranges", _I64),
        ("k", _I64),
        ("range", _P),
        ("visits", _P),
        ("visitors", _P),
        ("base", _P),
        ("scores", _P),
        ("found", _P),
    )


@lru_cache(maxsize=256)
def table_bytes(spec: QuantSpec) -> NDArray[np.uint8]:
    """Return the table of a spec as kernels look it up.

    Up to 5 bits integers + bias; beyond, the low bytes of all integers, then their high bytes.
    """
    table = integer_table(spec)
    if is_wide(spec.bits):
        pairs = table.values.astype("<i2").view(np.uint8).reshape(-1, 2)
        return np.ascontiguousarray(pairs.T).reshape(-1)
    shifted = (table.values + table.bias).astype(np.uint8)
    return np.tile(shifted, max(1, SHUFFLED // len(shifted)))


def integer_group(spec: QuantSpec, rows: int, stride: int) -> IntegerGroup:
    """Return the structure of codes at an address; the table lives as long as the cache."""
    table = integer_table(spec)
    return IntegerGroup(
        dim=spec.dim,
        bits=spec.bits,
        rows=rows,
        stride=stride,
        table=table_bytes(spec).ctypes.data,
        bias=table.bias,
        most=table.most,
        room=table.room,
        span=SPANS.get(spec.bits, 1),
        unit=float(table.unit),
    )
