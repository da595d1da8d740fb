"""Constant tensors of a spec (codebook, signs, rotation) on a device, made once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import TypeVar

import numpy as np
import torch

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.rotation import rotation_matrix, rotation_signs
from quantforge.spec import QuantSpec

F = TypeVar("F", bound=Callable[..., object])


def cached_constant(make: F) -> F:
    """Cache a function of hashable arguments that returns constant tensors.

    What is cached outlives the call, so a thread of its own makes it: outside of inference mode,
    of any tracing mode, and of the memory pool of a CUDA graph that the first caller warms up.
    """

    def made(*args: object) -> object:
        tensors = make(*args)
        for device in args:  # the caller may use it on another stream
            if isinstance(device, torch.device) and device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return tensors

    @lru_cache(maxsize=256)
    @wraps(make)
    def outside(*args: object) -> object:
        with ThreadPoolExecutor(1, f"quantforge {make.__name__}") as thread:
            return thread.submit(made, *args).result()

    return outside  # type: ignore[return-value]


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device)


@cached_constant
def centroids(spec: QuantSpec, device: torch.device) -> torch.Tensor:
    """Return the (2^bits,) float32 centroids."""
    return _to(codebook_of(spec).centroids, device)


@cached_constant
def boundaries(spec: QuantSpec, device: torch.device) -> torch.Tensor:
    """Return the (2^bits - 1,) float32 boundaries."""
    return _to(codebook_of(spec).boundaries, device)


@dataclass(frozen=True, eq=False)
class Cells:
    """Uniform cells over the range of the boundaries, each with one boundary at most.

    Attributes:
        slope: with `offset` maps u to its cell, clamped to [0, last].
        offset: see slope.
        last: index of the last cell.
        below: (cells,) uint8, boundaries in the cells before.
        boundary: (cells,) float32, the cell's own boundary, or infinity.
    """

    slope: float
    offset: float
    last: int
    below: torch.Tensor
    boundary: torch.Tensor

    def index(self, u: torch.Tensor) -> torch.Tensor:
        """Return the cell of each u (finite), int32; monotone in u."""
        return (u * self.slope).add_(self.offset).clamp_(0, self.last).to(torch.int32)


@cached_constant
def cells(spec: QuantSpec, device: torch.device) -> Cells:
    """Return cells that turn a search among the boundaries into one lookup and one comparison."""
    bounds = boundaries(spec, torch.device("cpu"))
    low, high, count = float(bounds[0]), float(bounds[-1]), 64
    while True:
        slope = float(np.float32((count - 2) / max(high - low, 1e-6)))
        offset = float(np.float32(1 - low * slope))
        empty = torch.empty(0)
        home = Cells(slope, offset, count - 1, empty, empty).index(bounds)
        if home.unique().numel() == home.numel():
            break
        count *= 2
    below = torch.searchsorted(home, torch.arange(count, dtype=torch.int32)).to(torch.uint8)
    boundary = torch.full((count,), torch.inf).index_copy(0, home.long(), bounds)
    return Cells(slope, offset, count - 1, below.to(device), boundary.to(device))


@cached_constant
def signs(dim: int, seed: int, device: torch.device) -> torch.Tensor:
    """Return the (dim, 1) float32 signs of a randomized Hadamard rotation."""
    return _to(rotation_signs(dim, seed)[:, None], device)


@cached_constant
def flips(dim: int, seed: int, device: torch.device) -> torch.Tensor:
    """Return the same as sign bits, (dim,) int16: what inverts a half-precision number's sign."""
    negative = rotation_signs(dim, seed) < 0
    return torch.from_numpy(np.where(negative, -(2**15), 0).astype(np.int16)).to(device)


@cached_constant
def rotation(spec: QuantSpec, seed: int, device: torch.device) -> torch.Tensor:
    """Return the orthogonal rotation R as a dense (dim, dim) float32 matrix."""
    return _to(rotation_matrix(spec, seed=seed), device)
