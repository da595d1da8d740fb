"""A `QuantSpec` as the C structure that kernels read, with the arrays it points to."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.encode import encode_constants
from quantforge.numerics.hadamard import dense_program
from quantforge.numerics.rotation import rotation_signs
from quantforge.spec import QuantSpec, hadamard_base

SCALE_RULES = ("unbiased", "norm", "mse")
FAST_BITS = 4
"""Up to here sixteen bytes hold the codebook, and one shuffle looks it up."""
_BYTE_PEAKS = np.arange(64, 127.01, 0.125)


class Rows(ctypes.Structure):
    """Rows of several groups; see kernels.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
    )


class Code(ctypes.Structure):
    """Numbers and tables of a spec; see kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dim", "bits", "order", "scale_rule")),
        ("wide_scales", ctypes.c_int32),
        ("dim_factor", ctypes.c_float),
        ("inv_sqrt_dim", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("dense", "signs", "centroids", "boundaries")),
        ("bytes", ctypes.c_void_p),
        ("byte_unit", ctypes.c_float),
    )


class Packed(ctypes.Structure):
    """Packed rows with their scales; see kernels.h."""

    _fields_ = (("code", ctypes.c_void_p), ("rows", Rows), ("scales", Rows))


class NativeCode:
    """A `Code` that keeps its arrays alive.

    Attributes:
        structure: the C structure.
        address: of the structure.
        has_bytes: whether precision "fast" can read it.
    """

    def __init__(self, spec: QuantSpec, byte_offset: int) -> None:
        constants = encode_constants(spec.dim)
        codebook = codebook_of(spec)
        order = hadamard_base(spec.dim) if spec.rotation == "hadamard" else 1
        assert order is not None, "QuantSpec admits only dims that have a Hadamard rotation"
        repeats = max(1, 16 >> spec.code_bits)
        byte_values, unit = byte_centroids(codebook.centroids)
        self._arrays: dict[str, NDArray] = {
            "dense": dense_words(order),
            "signs": rotation_signs(spec.dim, spec.seed),
            "centroids": np.tile(codebook.centroids, repeats),
            "boundaries": codebook.boundaries,
            "bytes": np.tile((byte_values + byte_offset).astype(np.uint8), repeats),
        }
        self.has_bytes = fits_bytes(spec)
        self.structure = Code(
            dim=spec.dim,
            bits=spec.code_bits,
            order=order,
            scale_rule=SCALE_RULES.index(spec.scale_rule),
            wide_scales=spec.scale_dtype == "float32",
            dim_factor=constants.dim,
            inv_sqrt_dim=constants.inv_sqrt_dim,
            byte_unit=unit,
            **{name: array.ctypes.data for name, array in self._arrays.items()},
        )
        self.address = ctypes.addressof(self.structure)


def dense_words(order: int) -> NDArray[np.int16]:
    """Return the dense stage and its transpose as kernels read them.

    First the index where the transpose begins; each is the number of factors, then for each factor
    the number of rows, and for each row the number of terms and these: column, coefficient.
    """
    forward, inverse = _words(order, transpose=False), _words(order, transpose=True)
    return np.array([1 + len(forward), *forward, *inverse], np.int16)


def _words(order: int, *, transpose: bool) -> list[int]:
    program = dense_program(order, transpose=transpose)
    words = [len(program)]
    for factor in program:
        words.append(len(factor))
        for terms in factor:
            words += [len(terms), *(number for term in terms for number in term)]
    return words


def fits_bytes(spec: QuantSpec) -> bool:
    """Return whether kernels can read the codes four channels at a time.

    With three bits, fields of both planes must share their place in a dword.
    """
    bits = spec.code_bits
    return bits <= FAST_BITS and (bits != 3 or spec.dim % 32 == 0) and spec.dim < 1 << 15


def byte_centroids(centroids: NDArray[np.float32]) -> tuple[NDArray[np.int64], float]:
    """Return int8 centroids and their unit: the multiple that rounds best.

    With sixteen values a peak below 127 may fit them better: at 4 bits it halves the error.
    """
    exact = centroids.astype(np.float64)
    top = np.abs(exact).max()
    scaled = exact * (_BYTE_PEAKS / top)[:, None]
    errors = np.square((np.rint(scaled) - scaled) * (top / _BYTE_PEAKS)[:, None]).sum(-1)
    peak = _BYTE_PEAKS[int(np.argmin(errors))]
    return np.rint(exact * (peak / top)).astype(np.int64), float(top / peak)


@lru_cache(maxsize=256)
def native_code(spec: QuantSpec, byte_offset: int) -> NativeCode:
    """Return the structure of a spec, made once."""
    return NativeCode(spec, byte_offset)
