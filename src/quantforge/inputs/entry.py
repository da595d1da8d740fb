"""One array of a file, before it is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantforge.spec import QuantSpec

EIGHT_BITS = ("int8", "uint8")
"""Integers that are read as float32, exactly."""


@dataclass(frozen=True)
class Entry:
    """What is known of an array without reading it.

    Attributes:
        shape: its shape.
        dtype: its dtype, as numpy or torch names it.
        open: returns the array, to be read in pieces.
        spec: its code, if it is a QuantTensor.
    """

    shape: tuple[int, ...]
    dtype: str
    open: Callable[[], Any]
    spec: QuantSpec | None = None

    @property
    def holds_vectors(self) -> bool:
        """Whether it can be an array of vectors."""
        numbers = "float" in self.dtype or self.dtype in EIGHT_BITS
        return numbers and len(self.shape) >= 2
