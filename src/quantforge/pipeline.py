"""`QuantPipeline`: arrays in, packed vectors out, and back, also for data larger than memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from quantforge.arrays import (
    CHUNK_NUMBERS,
    Array,
    Source,
    as_container,
    check_quantized,
    numpy_dtype,
    open_npy,
    pieces,
    progress_bar,
)
from quantforge.config import QuantForgeConfig
from quantforge.errors import InputError, QuantForgeError
from quantforge.numerics.packing import packed_width
from quantforge.numerics.statistics import equalizer_from_rms
from quantforge.ops.quantize import op as quantize_op
from quantforge.ops.quantize.api import check_scales
from quantforge.spec import QuantSpec
from quantforge.tensor import QuantTensor


class Statistics(NamedTuple):
    """What is taken out of all vectors before coding: `x = shift + equalizer * x'`.

    Attributes:
        shift: (dim,) float32 mean of the data, or None.
        equalizer: (dim,) float32, positive, or None.
    """

    shift: torch.Tensor | None = None
    equalizer: torch.Tensor | None = None

    def to(self, device: torch.device) -> Statistics:
        """Return a copy on a device."""
        return Statistics(*(None if t is None else t.to(device) for t in self))


class QuantPipeline:
    """Compresses vectors of one dim; numpy in, numpy out; torch in, torch out.

        pipeline = QuantPipeline(768, QuantForgeConfig(bits=4))
        codes = pipeline.compress(embeddings)        # QuantTensor, an eighth of the bytes
        restored = pipeline.decompress(codes)        # type, dtype and shape of `embeddings`

    With `config.shift` or `config.equalizer` the statistics are measured on the data, in one
    more pass over it; they are shared by all vectors and travel in the QuantTensor.

    Args:
        dim: vector length.
        config: the code.

    Raises:
        ConfigError: if the dim does not admit the config's rotation.
    """

    def __init__(self, dim: int, config: QuantForgeConfig | None = None) -> None:
        self.config = QuantForgeConfig() if config is None else config
        self.spec = self.config.spec(dim)
        self.dim = dim

    def __repr__(self) -> str:
        return f"QuantPipeline({self.dim}, {self.config})"

    def measure(self, data: Array | Iterable[Array], *, progress: bool | None = None) -> Statistics:
        """Measure the shift and the equalizer that the config asks for.

            shift = mean(x)        equalizer = (RMS of x - shift)^(1/2), greatest channel 1

        Args:
            data: (..., dim) array, or an iterable of such chunks.
            progress: show a bar; None: if it takes long, on a terminal.

        Returns:
            Statistics, (dim,) float32 each, accumulated in float64.

        Raises:
            InputError: for a wrong shape or dtype, NaN or infinity.

        Cost: reads the data once, a few MiB at a time; nothing if the config asks for neither.
        """
        if not (self.config.shift or self.config.equalizer):
            return Statistics()
        is_array = hasattr(data, "shape")
        moments = _Moments(self.dim)
        total = Source.of(data, self.dim).rows if is_array else None
        with progress_bar("measure", total, progress) as advance:
            for i, x in enumerate([data] if is_array else data):
                with _located(None if is_array else i):
                    source, start = Source.of(x, self.dim), 0
                    for chunk in source.chunks():
                        finite = torch.isfinite(chunk.to(torch.float32)).all(-1)
                        if not bool(finite.all()):
                            _raise_bad_vector(source, start, ~finite, self.spec)
                        moments.add(chunk)
                        start += len(chunk)
                        advance(len(chunk))
        return moments.statistics(self.config)

    def compress(
        self, x: Array, *, statistics: Statistics | None = None, progress: bool | None = None
    ) -> QuantTensor:
        """Quantize vectors: `x ~= shift + equalizer * R^T (scale * centroids[codes])`.

        Args:
            x: (..., dim) float16, float32, float64 or (torch) bfloat16; a single vector and no
                vectors at all are fine. A memory-mapped array is read a few MiB at a time.
            statistics: from `measure`; measured on x if None.
            progress: show a bar; None: if it takes long, on a terminal.

        Returns:
            QuantTensor of the shape, dtype and device of x, which remembers the container.

        Raises:
            InputError: for a wrong shape or dtype, NaN or infinity (with the index of the first
                bad vector), or a vector too large for the scale dtype.

        Source: arXiv 2504.19874, Algorithms 1 and 2.
        Cost: reads x once (twice with statistics), writes `bits / 8` bytes per number.
        """
        source = Source.of(x, self.dim)
        if statistics is None:
            statistics = self.measure(x, progress=progress)
        statistics = statistics.to(source.device)
        q = self._tensor(*self._empty_parts(source.shape[:-1], source.device), statistics, source)
        packed, scales = (t.view(-1, t.shape[-1]) for t in (q.packed, q.scales))
        start = 0
        with progress_bar("compress", source.rows, progress) as advance:
            for chunk in source.chunks():
                rows = slice(start, start + len(chunk))
                packed[rows], scales[rows] = self._quantize(source, start, chunk, statistics)
                start = rows.stop
                advance(len(chunk))
        return q

    def _quantize(
        self, source: Source, start: int, chunk: torch.Tensor, statistics: Statistics
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize a chunk of a source that begins at vector `start`."""
        packed, scales = quantize_op.quantize(chunk, *statistics, self.spec.key)
        bad = ~torch.isfinite(scales).all(-1)
        if bool(bad.any()):
            _raise_bad_vector(source, start, bad, self.spec)
        return packed, scales

    def _empty_parts(
        self, lead: tuple[int, ...], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width, dtype = packed_width(self.spec), getattr(torch, self.spec.scale_dtype)
        packed = torch.empty(*lead, width, dtype=torch.uint8, device=device)
        return packed, torch.empty(*lead, self.spec.scales_per_vector, dtype=dtype, device=device)

    def _tensor(
        self, packed: torch.Tensor, scales: torch.Tensor, statistics: Statistics, source: Source
    ) -> QuantTensor:
        shift, equalizer = statistics
        return QuantTensor(
            packed, scales, self.spec, shift=shift, equalizer=equalizer, dtype=source.dtype,
            container=source.container,
        )  # fmt: skip

    def decompress(self, q: QuantTensor) -> Array:
        """Decode vectors into what `compress` was given: container, dtype, shape and device.

        Raises:
            InputError: if q is not a QuantTensor of this dim, or stands for numpy data of a dtype
                that numpy does not have.

        Source: arXiv 2504.19874, Algorithms 1 and 2 (DeQuant).
        Cost: reads `bits / 8` bytes per number, writes one number each; float32 arithmetic.
        """
        check_quantized(q, self.dim)
        return as_container(q.dequantize(), q.container)

    def compress_stream(
        self,
        chunks: Iterable[Array],
        *,
        statistics: Statistics | None = None,
        progress: bool | None = None,
    ) -> Iterator[QuantTensor]:
        """Compress an iterable of arrays one by one, in the memory of one.

        Args:
            chunks: arrays (..., dim).
            statistics: from `measure`. If the config asks for statistics and None are given, the
                chunks are read twice, which an iterator or generator does not allow.
            progress: show a bar; None: if it takes long, on a terminal.

        Returns:
            Iterator of one QuantTensor per chunk, all with the same statistics.

        Raises:
            InputError: as `compress`, naming the chunk; or if statistics are needed from chunks
                that can be read only once.
        """
        if statistics is None and (self.config.shift or self.config.equalizer):
            if iter(chunks) is chunks:
                raise InputError(
                    "the config's shift or equalizer must be measured before the first chunk is "
                    "compressed, and an iterator can be read only once; give "
                    "statistics=pipeline.measure(...), or a list of chunks"
                )
            statistics = self.measure(chunks, progress=progress)
        return self._compress_each(chunks, statistics or Statistics(), progress)

    def _compress_each(
        self, chunks: Iterable[Array], statistics: Statistics, progress: bool | None
    ) -> Iterator[QuantTensor]:
        with progress_bar("compress", None, progress) as advance:
            for i, chunk in enumerate(chunks):
                with _located(i):
                    q = self.compress(chunk, statistics=statistics, progress=False)
                advance(prod(q.shape[:-1]))
                yield q

    def decompress_stream(self, chunks: Iterable[QuantTensor]) -> Iterator[Array]:
        """Decode an iterable of QuantTensors one by one, in the memory of one."""
        return (self.decompress(q) for q in chunks)

    def compress_file(
        self,
        source: str | PathLike[str] | Array,
        path: str | PathLike[str],
        *,
        name: str = "vectors",
        metadata: Mapping[str, str] | None = None,
        device: torch.device | str | None = None,
        progress: bool | None = None,
    ) -> None:
        """Compress a .npy file, or any array, into a quantforge file in constant memory.

        Args:
            source: path of a .npy file of (..., dim) floats, or such an array.
            path: of the safetensors file, or of a .npz file that numpy alone can decode; it
                replaces an old one when it is complete.
            name: of the tensor in the file.
            metadata: strings of your own for the header.
            device: where to compute; where the source is, if None.
            progress: show a bar; None: if it takes long, on a terminal.

        Raises:
            FormatError: if the source is not a .npy file.
            InputError: as `compress`.

        Cost: reads the source once (twice with statistics).
        """
        from quantforge.io import create_file  # loads safetensors
        from quantforge.io.npz import create_npz, is_npz

        create = create_npz if is_npz(path) else create_file
        array = open_npy(source) if isinstance(source, str | PathLike) else source
        checked = Source.of(array, self.dim)
        statistics = self.measure(array, progress=progress)
        empty = self._empty_parts(checked.shape[:-1], torch.device("meta"))
        template = self._tensor(*empty, statistics.to(empty[0].device), checked)
        where = checked.device if device is None else torch.device(device)
        local, start = statistics.to(where), 0
        with (
            create(path, {name: template}, metadata=metadata) as file,
            progress_bar("compress", checked.rows, progress) as advance,
        ):
            for chunk in checked.chunks():
                parts = self._quantize(checked, start, chunk.to(where), local)
                file.write(name, self._tensor(*parts, local, checked))
                start += len(chunk)
                advance(len(chunk))

    def decompress_file(
        self,
        path: str | PathLike[str],
        target: str | PathLike[str],
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: bool | None = None,
    ) -> None:
        """Decode a tensor of a quantforge file into a .npy file in constant memory.

        Args:
            path: of the quantforge file, safetensors or .npz.
            target: of the .npy file; it replaces an old one when it is complete.
            name: of the tensor; may be None if the file holds one quantized tensor.
            dtype: of the numbers; what the tensor stands for, if None.
            device: where to compute.
            progress: show a bar; None: if it takes long, on a terminal.

        Raises:
            FormatError: if the file is damaged.
            InputError: if there is no such tensor, or it stands for a dtype numpy does not have.
        """
        from quantforge.io.atomic import replacing

        q = quantized_in(path, name)
        check_quantized(q, self.dim)
        dtype = q.dtype if dtype is None else dtype
        descr = np.lib.format.dtype_to_descr(numpy_dtype(dtype))
        header = {"descr": descr, "fortran_order": False, "shape": tuple(q.shape)}
        with (
            replacing(Path(target)) as out,
            progress_bar("decompress", prod(q.shape[:-1]), progress) as advance,
        ):
            np.lib.format.write_array_header_1_0(out, header)
            parts: Iterable[Any] = [q[None]] if q.ndim == 1 else pieces(q, CHUNK_NUMBERS["cpu"])
            for piece in parts:
                decoded = piece.to(device).dequantize(dtype)
                out.write(as_container(decoded, "numpy").tobytes())
                advance(prod(piece.shape[:-1]))


def quantized_in(path: str | PathLike[str], name: str | None = None) -> QuantTensor:
    """Open a quantized tensor of a file, safetensors or .npz; its codes are mapped.

    Args:
        path: of the file.
        name: of the tensor; may be None if the file holds one quantized tensor.

    Raises:
        FormatError: if the file is damaged.
        InputError: if there is no such tensor.
    """
    from quantforge.io import open_file  # loads safetensors
    from quantforge.io.npz import is_npz, load_npz

    if is_npz(path):
        return load_npz(path)
    with open_file(path) as file:
        names = [n for n in file if file.info(n).spec is not None and name in (None, n)]
        if len(names) != 1:
            raise InputError(
                f"name one quantized tensor of {path}; it has {sorted(file)}; got name={name!r}"
            )
        return file[names[0]]  # type: ignore[return-value]


@contextmanager
def _located(chunk: int | None) -> Iterator[None]:
    """Say in which chunk of a stream an error occurred."""
    try:
        yield
    except QuantForgeError as error:
        if chunk is None:
            raise
        raise type(error)(f"chunk {chunk}: {error}") from error


class _Moments:
    """Mean and second moment per channel, accumulated in float64 chunk by chunk.

    Chan, Golub & LeVeque (1979): exact to rounding also where the mean is far from zero.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean, self.squares = np.zeros(dim), np.zeros(dim)

    def add(self, chunk: torch.Tensor) -> None:
        if len(chunk) == 0:
            return
        x = chunk.to(torch.float64)
        mean = x.mean(0)
        squares = (x - mean).square_().sum(0).cpu().numpy()
        total = self.count + len(chunk)
        delta = mean.cpu().numpy() - self.mean
        self.squares += squares + delta * delta * (self.count * len(chunk) / total)
        self.mean += delta * (len(chunk) / total)
        self.count = total

    def statistics(self, config: QuantForgeConfig) -> Statistics:
        """Return what the config asks for; without a shift, the RMS is about zero."""
        variance = self.squares / max(self.count, 1)
        rms = np.sqrt(variance if config.shift else variance + np.square(self.mean))
        shift, equalizer = self.mean.astype(np.float32), equalizer_from_rms(rms).astype(np.float32)
        return Statistics(
            torch.from_numpy(shift) if config.shift else None,
            torch.from_numpy(equalizer) if config.equalizer else None,
        )


def _raise_bad_vector(source: Source, start: int, bad: torch.Tensor, spec: QuantSpec) -> None:
    """Raise the error of `quantize` for the first bad vector of a chunk that begins at `start`."""
    scales = torch.zeros(source.rows, 1)
    scales[start : start + len(bad)][bad.cpu()] = torch.nan
    check_scales(source, scales.view(*source.shape[:-1], 1), spec)  # type: ignore[arg-type]
