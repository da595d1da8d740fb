"""Write one safetensors file, whole tensors or a few rows at a time.

The layout is that of the safetensors package (8 bytes of header length, a JSON header, the
arrays without gaps, wide dtypes first), which reads these files. It is written here because that
package needs all data in memory, and twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import BinaryIO

import torch

from quantforge.errors import InputError
from quantforge.io.atomic import replacing
from quantforge.io.header import (
    DTYPE_CODES,
    LOGICAL_DTYPES,
    TensorInfo,
    check_names,
    info_of,
    key_of,
    make_metadata,
    parts_of,
)
from quantforge.io.index import check_target, retire
from quantforge.tensor import QuantTensor

DATA_ALIGNMENT = 64
"""The header is padded with spaces so that the data begin on a cache line."""


class FileWriter:
    """Fills the tensors of a file that `create_file` laid out."""

    def __init__(self, file: BinaryIO, infos: Mapping[str, TensorInfo], metadata: dict[str, str]):
        self._file, self._infos = file, infos
        arrays = {key_of(n, p): part for n, i in infos.items() for p, part in i.parts.items()}
        self._position: dict[str, int] = {}
        self._end: dict[str, int] = {}
        offset = 0
        header: dict[str, object] = {"__metadata__": metadata}
        for key, part in sorted(arrays.items(), key=lambda a: (-a[1].dtype.itemsize, a[0])):
            self._position[key], self._end[key] = offset, offset + part.nbytes
            header[key] = {
                "dtype": DTYPE_CODES[part.dtype],
                "shape": part.shape,
                "data_offsets": [offset, offset + part.nbytes],
            }
            offset += part.nbytes
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
        file.write(len(text).to_bytes(8, "little") + text)
        self._data = 8 + len(text)
        file.truncate(self._data + offset)
        self._statistics: dict[str, torch.Tensor] = {}

    def write(self, name: str, value: torch.Tensor) -> None:
        """Append a tensor, or its next rows, to what `name` holds so far.

        Args:
            name: one of the names given to `create_file`.
            value: plain tensor or QuantTensor of the template's dtype, spec and last axis. All
                rows of a QuantTensor must have the shift and equalizer of the first ones.

        Raises:
            InputError: if it is not of the template's kind, or more than its shape holds.
        """
        info = self._infos.get(name)
        if info is None:
            raise InputError(f"no tensor {name!r} was declared; declared: {sorted(self._infos)}")
        ours = info_of(value)
        kind = (ours.dtype, ours.spec, list(ours.parts), ours.shape[-1:])
        expected = (info.dtype, info.spec, list(info.parts), info.shape[-1:])
        if kind != expected:
            raise InputError(f"rows of {name!r} must be {expected}; got {kind}")
        for part, t in parts_of(value).items():
            key = key_of(name, part)
            if part in ("shift", "equalizer"):
                if key in self._statistics:
                    self._check_same(key, t)
                    continue
                self._statistics[key] = t
            self._append(key, t)

    def _check_same(self, key: str, t: torch.Tensor) -> None:
        first = self._statistics[key]
        if t is not first and not torch.equal(t.flatten(), first.flatten()):
            raise InputError(f"{key!r} differs between rows; compress them with one `statistics`")

    def _append(self, key: str, t: torch.Tensor) -> None:
        nbytes = t.numel() * t.element_size()
        start = self._position[key]
        if start + nbytes > self._end[key]:
            raise InputError(f"{key!r} gets more rows than its declared shape holds")
        if nbytes:
            self._file.seek(self._data + start)
            self._file.write(_bytes_of(t))
            self._position[key] = start + nbytes

    def check_complete(self) -> None:
        """Raise `InputError` if some rows were never written."""
        for key, end in self._end.items():
            if self._position[key] != end:
                missing = end - self._position[key]
                raise InputError(f"{key!r} is incomplete: {missing} bytes were not written")


def _bytes_of(t: torch.Tensor) -> memoryview:
    t = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if t.dtype.is_complex:
        t = torch.view_as_real(t)
    return t.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def create_file(
    path: str | PathLike[str],
    templates: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[FileWriter]:
    """Create a file whose tensors are written piece by piece, in constant memory.

    The file takes the place of an old one when the context ends; after an exception, or a kill,
    the old one is untouched.

        with create_file("big.safetensors", {"x": template}) as file:
            for rows in pipeline.compress_stream(chunks):
                file.write("x", rows)

    Args:
        path: of the file.
        templates: name -> plain tensor or QuantTensor with the dtype, spec and full shape to
            come; its values are not read, so it may be on the meta device.
        metadata: strings of your own for the header.

    Raises:
        InputError: for names that collide, unsupported dtypes, or rows missing at the end.
    """
    path = check_target(path)
    infos = {name: info_of(check_value(name, value)) for name, value in templates.items()}
    check_names(infos)
    header = make_metadata(infos, metadata or {})
    with replacing(path) as file:
        writer = FileWriter(file, infos, header)
        yield writer
        writer.check_complete()
    retire(path)


def check_value(name: str, value: object) -> torch.Tensor:
    """Return value if a file can hold it as it is, else raise `InputError`."""
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"{name!r} must be a torch.Tensor or a QuantTensor; got {type(value).__name__}; "
            "use torch.from_numpy(array), or QuantPipeline.compress(array)"
        )
    if isinstance(value, QuantTensor):
        if value._n_rep != 1 or value._transposed:
            raise InputError(f"{name!r} is a lazy view of a QuantTensor; save what it views")
        if str(value.dtype).removeprefix("torch.") not in LOGICAL_DTYPES:
            raise InputError(f"{name!r} stands for {value.dtype}, which files do not support")
    elif value.layout != torch.strided or value.dtype not in DTYPE_CODES:
        raise InputError(
            f"{name!r} must be a dense tensor of one of {', '.join(map(str, DTYPE_CODES))}; got "
            f"{value.dtype}, {value.layout}"
        )
    return value
