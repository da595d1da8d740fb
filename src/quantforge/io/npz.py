"""Compressed vectors as a .npz file, which numpy alone can read and decode.

docs/format.md lists the arrays, and the lines that decode them. Beyond what a safetensors file
holds there are `centroids`, `planes` and the factors of the rotation.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from os import PathLike
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch

from quantforge.errors import FormatError, InputError
from quantforge.io.atomic import replacing
from quantforge.io.header import (
    MARKER,
    PARTS,
    TABLE,
    VERSION,
    Part,
    TensorInfo,
    build,
    info_of,
    key_of,
    make_metadata,
    parse_infos,
    parse_json,
)
from quantforge.io.npy import MEMBER_SUFFIX, Member, members
from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.hadamard import base_matrix
from quantforge.numerics.packing import planes
from quantforge.numerics.rotation import rotation_signs
from quantforge.spec import QuantSpec, hadamard_base
from quantforge.tensor import QuantTensor

NPZ = ".npz"
NAME = "vectors"
"""What the one tensor of a file is called."""
COPY_BYTES = 1 << 20


class NpzWriter:
    """Fills the tensor of a file that `create_npz` laid out."""

    def __init__(self, archive: zipfile.ZipFile, name: str, info: TensorInfo, spool: BinaryIO):
        self._archive, self._name, self._info, self._spool = archive, name, info, spool
        self._rows, self._statistics = 0, dict[str, torch.Tensor]()
        self._packed = self._begin("packed")

    def _begin(self, part: str) -> IO[bytes]:
        """Open the array of a part, which may be larger than 4 GiB, and write its header."""
        dtype, shape = self._info.parts[part]
        file = self._archive.open(zipfile.ZipInfo(part + MEMBER_SUFFIX), "w", force_zip64=True)
        descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        return file

    def write(self, name: str, value: torch.Tensor) -> None:
        """Append the next rows.

        Args:
            name: of the tensor.
            value: QuantTensor of the template's spec; its shift and equalizer are those of all.

        Raises:
            InputError: if it is not of the template's kind.
        """
        info = info_of(value)
        expected = (self._name, self._info.spec, list(self._info.parts))
        if (name, info.spec, list(info.parts)) != expected or not isinstance(value, QuantTensor):
            raise InputError(f"rows must be {expected}; got {(name, info.spec, list(info.parts))}")
        self._packed.write(value.packed.cpu().contiguous().numpy().data)
        self._spool.write(value.scales.cpu().contiguous().numpy().data)
        self._rows += prod(value.shape[:-1])
        given = {"shift": value.shift, "equalizer": value.equalizer}
        self._statistics |= {part: t for part, t in given.items() if t is not None}

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what follows the codes.

        Raises:
            InputError: if some rows were never written.
        """
        if self._rows != prod(self._info.shape[:-1]):
            raise InputError(f"{self._rows} of {prod(self._info.shape[:-1])} rows were written")
        self._packed.close()
        self._spool.seek(0)
        with self._begin("scales") as file:
            while data := self._spool.read(COPY_BYTES):
                file.write(data)
        for part, t in self._statistics.items():
            self._small(part, t.reshape(-1).cpu().numpy())
        spec = self._info.spec
        assert spec is not None
        entry = json.loads(make_metadata({NAME: self._info}, {})[TABLE])[NAME]
        header = {"version": VERSION, **entry, "metadata": dict(metadata)}
        for key, array in _decoding(spec).items():
            self._small(key, array)
        self._small(MARKER, np.array(json.dumps(header)))

    def close(self) -> None:
        """Close the array of codes."""
        self._packed.close()

    def _small(self, name: str, array: np.ndarray) -> None:
        with self._archive.open(zipfile.ZipInfo(name + MEMBER_SUFFIX), "w") as file:
            np.lib.format.write_array(file, array, version=(1, 0))


def _decoding(spec: QuantSpec) -> dict[str, np.ndarray]:
    """Return what decoding needs beside the codes; a QR rotation follows from the seed."""
    fields = [(p.width, p.shift, p.offset, p.stride) for p in planes(spec.dim, spec.code_bits)]
    found: dict[str, np.ndarray] = {
        "centroids": codebook_of(spec).centroids,
        "planes": np.array(fields, np.int32),
    }
    if spec.rotation == "hadamard":
        base = hadamard_base(spec.dim)
        assert base is not None, "QuantSpec admits only dims that have a Hadamard rotation"
        found["signs"] = rotation_signs(spec.dim, spec.seed).astype(np.int8)
        found["hadamard"] = base_matrix(base)
    return found


@contextmanager
def create_npz(
    path: str | PathLike[str],
    templates: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[NpzWriter]:
    """Create a .npz file of one QuantTensor that is written piece by piece.

    As `create_file`: it takes the place of an old one when the context ends well. Scales wait in
    a temporary file beside it.

    Raises:
        InputError: for anything but one QuantTensor with one shift and equalizer for all vectors,
            or `estimator="prod"`.
    """
    path = Path(path)
    if len(templates) != 1:
        raise InputError(f"a .npz file holds one QuantTensor; got {sorted(templates)}")
    ((name, template),) = templates.items()
    if not isinstance(template, QuantTensor):
        raise InputError(f"a .npz file holds a QuantTensor; got {type(template).__name__}")
    info = info_of(template)
    make_metadata({name: info}, metadata or {})
    shared = all(
        prod(info.parts[part].shape) == template.spec.dim
        for part in ("shift", "equalizer")
        if part in info.parts
    )
    if template.spec.estimator == "prod" or not shared:
        raise InputError(
            'a .npz file holds neither estimator="prod" nor a shift of each row; write '
            f"{path.with_suffix('.safetensors').name}"
        )
    with (
        replacing(path) as file,
        tempfile.TemporaryFile(dir=path.parent) as spool,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        writer = NpzWriter(archive, name, info, spool)
        try:
            yield writer
            writer.finish(metadata or {})
        finally:
            writer.close()  # an archive with an open member cannot be closed


def is_npz(path: str | PathLike[str]) -> bool:
    """Whether a path names a .npz file."""
    return Path(path).suffix.lower() == NPZ


def load_npz(path: str | PathLike[str]) -> QuantTensor:
    """Load the tensor of a .npz file; its codes are mapped, and read when they are touched.

    Raises:
        FormatError: for a file that is damaged, from the future, or not quantforge's.
    """
    found = members(path)
    info = _info(path, found)
    arrays = {part: found[part].read() for part in info.parts if part != "packed"}
    packed = found["packed"]
    arrays["packed"] = packed.mapped() if packed.is_stored else packed.read()
    return build(info, {part: torch.from_numpy(a) for part, a in arrays.items()})  # type: ignore[return-value]


def npz_info(path: str | PathLike[str]) -> TensorInfo | None:
    """Return what a .npz file says of its QuantTensor, or None if it is not quantforge's."""
    found = members(path)
    return _info(path, found) if MARKER in found else None


def _info(path: str | PathLike[str], found: Mapping[str, Member]) -> TensorInfo:
    if MARKER not in found:
        raise FormatError(f"{path} was not written by quantforge: it has no array {MARKER!r}")
    header: dict[str, Any] = parse_json(f"{path}: {MARKER!r}", str(found[MARKER].read()))
    version = str(header.pop("version", None))
    header.pop("metadata", None)
    stored = {key_of(NAME, key): _part(m) for key, m in found.items() if key in PARTS}
    table = {MARKER: version, TABLE: json.dumps({NAME: header})}
    return parse_infos(str(path), table, stored)[NAME]


def _part(member: Member) -> Part:
    try:
        dtype = torch.from_numpy(np.empty(0, member.header.dtype)).dtype
    except (TypeError, ValueError) as error:
        raise FormatError(f"{member.where} has dtype {member.header.dtype}: {error}") from error
    return Part(dtype, member.header.shape)
