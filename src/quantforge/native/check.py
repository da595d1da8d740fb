"""A self-check of the library on load: a few vectors through it and through `numerics`."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quantforge.native.code import NativeCode, Packed, Rows
from quantforge.numerics.encode import Encoded, decode, encode
from quantforge.numerics.packing import packed_width
from quantforge.numerics.rotation import rotation_matrix
from quantforge.spec import QuantSpec

SPECS = (QuantSpec(96, 3, scale_rule="norm"), QuantSpec(64, 4), QuantSpec(40, 7, scale_rule="mse"))
VECTORS = 37
TOLERANCE = 1e-5
_ZERO = np.zeros(1, np.int64)


class Callee(Protocol):
    """The part of a `Library` that the check needs."""

    byte_offset: int

    def call(self, name: str, *args: object) -> None:
        """Call a function of the interface."""


def rows_of(array: NDArray) -> Rows:
    """Return the rows of a contiguous matrix."""
    return Rows(array.ctypes.data, _ZERO.ctypes.data, array.strides[0])


def self_check(library: Callee) -> str | None:
    """Return what the library computes wrongly, or None."""
    for spec in SPECS:
        x = np.random.RandomState(spec.dim).standard_normal((VECTORS, spec.dim))
        x = x.astype(np.float32)
        code = NativeCode(spec, library.byte_offset)
        got = _quantize(library, code, x, spec)
        want = encode(x, spec)
        if got.packed.tobytes() != want.packed.tobytes():
            return f"codes differ for {spec.key}"
        if got.scales.tobytes() != want.scales.tobytes():
            return f"scales differ for {spec.key}"
        if not _scores_agree(library, code, x[:3], got, spec):
            return f"scores are wrong for {spec.key}"
    return None


def _quantize(library: Callee, code: NativeCode, x: NDArray, spec: QuantSpec) -> Encoded:
    packed = np.empty((len(x), packed_width(spec)), np.uint8)
    scales = np.empty((len(x), 1), spec.scale_dtype)
    out = Packed(code.address, rows_of(packed), rows_of(scales))
    rows, nothing = rows_of(x), (None,) * 4
    library.call("qf_quantize", code.address, 1, len(x), ctypes.byref(rows), 0, *nothing, out, 1)
    return Encoded(packed, scales)


def _scores_agree(
    library: Callee, code: NativeCode, query: NDArray, encoded: Encoded, spec: QuantSpec
) -> bool:
    operand = Packed(code.address, rows_of(encoded.packed), rows_of(encoded.scales))
    rotated = np.ascontiguousarray(query @ rotation_matrix(spec).T, np.float32)
    got = np.empty((len(query), len(encoded.packed)), np.float32)
    sizes = (1, len(query), len(encoded.packed))
    pointers = (rotated.ctypes.data, None, ctypes.byref(rows_of(got)))
    library.call("qf_scores", operand, *sizes, *pointers, 0, 0, 1)
    want = query.astype(np.float64) @ decode(encoded, spec).T
    return bool(np.abs(got - want).max() <= TOLERANCE * np.abs(want).max())
