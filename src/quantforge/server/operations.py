"""What a server does with arrays, in pieces: compress, decompress, benchmark, optimize.

Each function looks at its input and returns an operation to run, now or as a job.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantforge.arrays import CHUNK_NUMBERS, as_tensor, numpy_dtype, pieces
from quantforge.config import QuantForgeConfig
from quantforge.errors import FormatError, InputError
from quantforge.io import create_file
from quantforge.io.header import MARKER
from quantforge.numerics.packing import packed_width
from quantforge.ops.constants import rotation
from quantforge.pipeline import QuantPipeline, Statistics
from quantforge.server.bodies import NPY, SAFETENSORS, Tensors
from quantforge.server.errors import too_large
from quantforge.server.work import Answer, Download, Operation, Progress
from quantforge.spec import QuantSpec
from quantforge.tensor import QuantTensor

COMPRESSIBLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_JSON_NUMBERS = 1 << 20
RESULT = "result"
MAX_ROTATION_BYTES = 1 << 28


class _Counted:
    """Arrays in pieces, each counted towards the progress of an operation."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._done, self._progress = max(total, 1), 0, progress

    def pieces(self, array: Any, device: str) -> Iterator[Any]:
        rows = array[None] if array.ndim == 1 else array
        for piece in pieces(rows, CHUNK_NUMBERS[torch.device(device).type]):
            self._progress(self._done / self._total)
            yield piece
            self._done += prod(piece.shape)


class DenseRotations:
    """Keeps the matrices of QR rotations, which are cached by dim and seed, within a size."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cached: set[tuple[int, int]] = set()

    def admit(self, spec: QuantSpec, limit: int) -> None:
        """Make room for the matrix of a spec, if it has one.

        Raises:
            ApiError: for one beyond the limit.
        """
        if spec.rotation == "hadamard":
            return
        if spec.dim > limit:
            raise too_large(
                f"rotation={spec.rotation!r} has at most dim {limit} here; got {spec.dim}",
                "pad vectors to 2^k times 1, 12, 20 or 28 numbers, which have a Hadamard rotation",
            )
        with self._lock:
            self._cached.add((spec.dim, spec.seed))
            if sum(4 * dim * dim for dim, _ in self._cached) > MAX_ROTATION_BYTES:
                rotation.cache_clear()  # type: ignore[attr-defined]
                self._cached = {(spec.dim, spec.seed)}


DENSE = DenseRotations()
"""Of this process, as the cache is."""


def compress(
    tensors: Tensors, config: QuantForgeConfig, folder: Path, device: str, max_dense_dim: int
) -> Operation:
    """Pack floating-point tensors of two axes and more; others stay as they are.

    Raises:
        InputError: if there is nothing to pack, or something is packed already.
        ConfigError: if a dim does not admit the rotation.
        ApiError: for a rotation that is too much work.
    """
    values = {name: _plain(name, value) for name, value in tensors.values.items()}
    few = len(values) == 1
    chosen = {
        name: QuantPipeline(t.shape[-1], config)
        for name, t in values.items()
        if t.dtype in COMPRESSIBLE and t.ndim >= (1 if few else 2)
    }
    if not chosen:
        found = {name: f"{t.dtype} {tuple(t.shape)}" for name, t in values.items()}
        raise InputError(f"no tensor holds vectors of floating-point numbers; got {found}")
    for pipeline in chosen.values():
        DENSE.admit(pipeline.spec, max_dense_dim)
    passes = 2 if config.shift or config.equalizer else 1
    metadata = {k: v for k, v in tensors.metadata.items() if not k.startswith(MARKER)}

    def run(progress: Progress) -> Answer:
        counted = _Counted(passes * sum(values[name].numel() for name in chosen), progress)
        statistics = {
            name: pipeline.measure(
                list(counted.pieces(values[name], device)) if passes == 2 else []
            )
            for name, pipeline in chosen.items()
        }
        templates = {
            name: _template(chosen[name], t, statistics[name]) if name in chosen else t
            for name, t in values.items()
        }
        path = folder / RESULT
        with create_file(path, templates, metadata=metadata) as file:
            for name, t in values.items():
                if name not in chosen:
                    file.write(name, t)
                    continue
                start = 0
                for piece in counted.pieces(t, device):
                    q = _packed(name, start, piece, chosen[name], statistics[name], device)
                    file.write(name, q)
                    start += prod(piece.shape[:-1])
        return Download(path, SAFETENSORS)

    return run


def _plain(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, QuantTensor):
        raise InputError(f"{name} is packed already; decompress it first")
    if isinstance(value, np.ndarray) and value.dtype.kind not in "fiub":
        raise InputError(f"{name} must hold numbers; got {value.dtype}")
    return as_tensor(value)


def _template(pipeline: QuantPipeline, t: torch.Tensor, statistics: Statistics) -> QuantTensor:
    spec = pipeline.spec
    lead, meta = t.shape[:-1], torch.device("meta")
    packed = torch.empty(*lead, packed_width(spec), dtype=torch.uint8, device=meta)
    dtype = getattr(torch, spec.scale_dtype)
    scales = torch.empty(*lead, spec.scales_per_vector, dtype=dtype, device=meta)
    shift, equalizer = statistics.to(meta)
    return QuantTensor(packed, scales, spec, shift=shift, equalizer=equalizer, dtype=t.dtype)


def _packed(
    name: str,
    start: int,
    piece: torch.Tensor,
    pipeline: QuantPipeline,
    statistics: Statistics,
    device: str,
) -> torch.Tensor:
    try:
        return pipeline.compress(piece.to(device), statistics=statistics, progress=False).cpu()
    except InputError as error:
        raise InputError(f"{name}, counting from vector {start}: {error}") from error


def decompress(
    tensors: Tensors, form: str, folder: Path, device: str, max_dense_dim: int
) -> Operation:
    """Decode packed tensors, into the file format asked for.

    Raises:
        InputError: if nothing is packed, or the format does not hold what is there.
        ApiError: for a rotation that is too much work, or too much for JSON.
    """
    packed = {n: t for n, t in tensors.values.items() if isinstance(t, QuantTensor)}
    if not packed:
        raise InputError("the body holds no packed tensors; send what /compress answered")
    for q in packed.values():
        DENSE.admit(q.spec, max_dense_dim)
    total = sum(q.numel() for q in packed.values())
    if form != "safetensors" and len(packed) > 1:
        raise InputError(f"{form} holds one tensor; got {sorted(packed)}; use format=safetensors")
    if form == "json" and total > MAX_JSON_NUMBERS:
        raise too_large(f"JSON holds at most {MAX_JSON_NUMBERS} numbers; got {total}",
                        "use format=npy")  # fmt: skip
    name, q = next(iter(packed.items()))
    dtype = numpy_dtype(q.dtype) if form == "npy" else None

    def run(progress: Progress) -> Answer:
        counted, path = _Counted(total, progress), folder / RESULT
        if form == "json":
            return {name: _finite(name, _decoded(q, device).float()).tolist()}
        if dtype is not None:
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": tuple(q.shape),
            }
            with open(path, "wb") as out:
                np.lib.format.write_array_header_1_0(out, header)
                for piece in counted.pieces(q, device):
                    out.write(_decoded(piece, device).numpy().tobytes())
            return Download(path, NPY)
        templates = {
            n: torch.empty(t.shape, dtype=t.dtype, device="meta") if n in packed else t
            for n, t in tensors.values.items()
        }
        with create_file(path, templates, metadata=tensors.metadata) as file:
            for n, t in tensors.values.items():
                for piece in counted.pieces(t, device) if n in packed else ():
                    file.write(n, _decoded(piece, device))
                if n not in packed:
                    file.write(n, t)
        return Download(path, SAFETENSORS)

    return run


def _decoded(q: QuantTensor, device: str) -> torch.Tensor:
    return q.to(device).dequantize().cpu()


def _finite(name: str, x: torch.Tensor) -> torch.Tensor:
    if not bool(x.isfinite().all()):
        raise FormatError(f"{name} decodes to NaN or infinity, which JSON cannot hold; its codes "
                          "are damaged, or use format=npy")  # fmt: skip
    return x
