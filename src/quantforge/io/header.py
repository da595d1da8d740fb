"""What a file says about its tensors: keys, header metadata, and their validation.

Header metadata (a safetensors header holds strings only):

    "quantforge"           format version, "2"; "1" is read too, but for Hadamard rotations of dims
                           12 * 2^k, 20 * 2^k, 28 * 2^k: their matrices were others
    "quantforge.tensors"   JSON: {name: {"spec": {...}, "shape": [...], "dtype": "float32",
                                         "container": "torch", "parts": ["packed", "scales"]}}
    anything else          the user's

Tensor `name` lies under the keys `name.packed`, `name.scales`, `name.shift`, `name.equalizer`; a
plain tensor under its own name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, get_args

import torch

from quantforge.errors import ConfigError, FormatError, InputError
from quantforge.spec import QuantSpec, hadamard_base
from quantforge.tensor import Container, QuantTensor

MARKER = "quantforge"
VERSION = "2"
READABLE = ("1", VERSION)
TABLE = "quantforge.tensors"

REQUIRED_PARTS = ("packed", "scales")
PARTS = (*REQUIRED_PARTS, "shift", "equalizer")
PLAIN = ""
"""The only part of a plain tensor."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""dtypes as safetensors names them; files hold no others."""
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
LOGICAL_DTYPES = {str(d).removeprefix("torch."): d for d in DTYPE_CODES if d.is_floating_point}
"""dtypes a QuantTensor in a file can stand for, as torch names them."""

_FIELDS = ("spec", "shape", "dtype", "container", "parts")
_SPEC_FIELDS = tuple(field.name for field in dataclasses.fields(QuantSpec))


class Part(NamedTuple):
    """One stored array."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without loading it.

    Attributes:
        shape: logical shape.
        dtype: logical dtype.
        spec: the code, or None for a plain tensor.
        container: "torch" or "numpy".
        parts: the stored arrays by part ("packed", ...); a plain tensor has one, named "".
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: QuantSpec | None
    container: Container
    parts: Mapping[str, Part]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(part.nbytes for part in self.parts.values())


def key_of(name: str, part: str) -> str:
    """Return the key in the file of one part of a tensor."""
    return name if part == PLAIN else f"{name}.{part}"


def parts_of(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arrays to store for a plain tensor or a QuantTensor."""
    if not isinstance(value, QuantTensor):
        return {PLAIN: value}
    parts = {part: getattr(value, part) for part in PARTS}
    return {part: t for part, t in parts.items() if t is not None}


def info_of(value: torch.Tensor) -> TensorInfo:
    """Describe a tensor (which may be on the meta device)."""
    parts = {part: Part(t.dtype, tuple(t.shape)) for part, t in parts_of(value).items()}
    if isinstance(value, QuantTensor):
        return TensorInfo(tuple(value.shape), value.dtype, value.spec, value.container, parts)
    return TensorInfo(tuple(value.shape), value.dtype, None, "torch", parts)


# ---- writing -------------------------------------------------------------------------------


def check_names(infos: Mapping[str, TensorInfo]) -> None:
    """Raise `InputError` unless the names can be told apart in a file."""
    reserved = {
        key_of(name, part): name
        for name, i in infos.items()
        if i.spec is not None
        for part in PARTS
    }
    for name in infos:
        if not isinstance(name, str) or not name or name == "__metadata__" or not _is_text(name):
            raise InputError(
                'tensor names must be non-empty strings of valid Unicode other than "__metadata__";'
                f" got {name!r}"
            )
        if name in reserved:
            raise InputError(
                f"the name {name!r} is reserved for a part of the quantized tensor "
                f"{reserved[name]!r}; rename one of them"
            )


def _is_text(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


def make_metadata(infos: Mapping[str, TensorInfo], user: Mapping[str, str]) -> dict[str, str]:
    """Return the header metadata of a file.

    Raises:
        InputError: if the user's metadata are not strings or use a reserved key.
    """
    for key, text in user.items():
        if not (isinstance(key, str) and isinstance(text, str) and _is_text(key + text)):
            raise InputError(
                "metadata must map strings to strings, because a safetensors header holds nothing "
                f"else; got {key!r}: {text!r}; use json.dumps"
            )
        if key.startswith(MARKER):
            raise InputError(f"metadata keys that begin with {MARKER!r} are reserved; got {key!r}")
    table = {name: _to_json(info) for name, info in infos.items() if info.spec is not None}
    return {MARKER: VERSION, TABLE: json.dumps(table), **user}


def _to_json(info: TensorInfo) -> dict[str, Any]:
    assert info.spec is not None
    return {
        "spec": {field: getattr(info.spec, field) for field in _SPEC_FIELDS},
        "shape": list(info.shape),
        "dtype": str(info.dtype).removeprefix("torch."),
        "container": info.container,
        "parts": list(info.parts),
    }


# ---- reading -------------------------------------------------------------------------------


def check_version(where: str, metadata: Mapping[str, str]) -> None:
    """Raise `FormatError` unless this version of quantforge reads the file."""
    version = metadata.get(MARKER)
    if version is None:
        raise FormatError(
            f"{where} was not written by quantforge: its header has no {MARKER!r} entry; load "
            "plain tensors with safetensors.torch.load_file"
        )
    if version not in READABLE:
        raise FormatError(
            f"{where} has format version {version!r}; this quantforge reads "
            f"{' and '.join(map(repr, READABLE))}; "
            "upgrade quantforge if the file is newer"
        )


def parse_infos(
    where: str, metadata: Mapping[str, str], stored: Mapping[str, Part]
) -> dict[str, TensorInfo]:
    """Read and check the table of a file against the arrays in it.

    Args:
        where: the file, for messages.
        metadata: header metadata.
        stored: dtype and shape of every array in the file.

    Raises:
        FormatError: naming the tensor and the field that is wrong.
    """
    check_version(where, metadata)
    table = parse_json(f"{where}: header entry {TABLE!r}", metadata.get(TABLE))
    infos: dict[str, TensorInfo] = {}
    reserved: dict[str, str] = {}
    for name, entry in table.items():
        info = _parse_entry(f"{where}: tensor {name!r}", name, entry, stored)
        _check_rotation(f"{where}: tensor {name!r}", metadata[MARKER], info)
        infos[name] = info
        reserved |= {key_of(name, part): name for part in PARTS}
    listed = {key_of(name, part) for name, info in infos.items() for part in info.parts}
    for key, part in stored.items():
        if key in listed:
            continue
        if key in reserved or key in infos:
            raise FormatError(
                f"{where}: array {key!r} is present but not listed in the parts of tensor "
                f"{reserved.get(key, key)!r}"
            )
        infos[key] = TensorInfo(part.shape, part.dtype, None, "torch", {PLAIN: part})
    return infos


def _check_rotation(where: str, version: str, info: TensorInfo) -> None:
    """Raise `FormatError` for codes of a rotation that is no longer computed."""
    spec = info.spec
    assert spec is not None
    if version == "1" and spec.rotation == "hadamard" and hadamard_base(spec.dim) != 1:
        raise FormatError(
            f"{where}: dim {spec.dim} with a Hadamard rotation in format version '1': rotations of "
            "dims other than powers of two have changed since, so its codes would decode to wrong "
            "vectors; quantize the original vectors again and save them"
        )


def parse_json(where: str, text: str | None) -> dict[str, Any]:
    """Return a JSON object; anything else is a `FormatError`."""
    try:
        value = json.loads(text) if text is not None else None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} must be a JSON object; got {_short(value)}")
    return value


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_fields(where: str, value: object, expected: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(expected):
        got = sorted(value) if isinstance(value, dict) else value
        raise FormatError(f"{where} must have the fields {list(expected)}; got {_short(got)}")
    return value


def _parse_entry(where: str, name: str, entry: object, stored: Mapping[str, Part]) -> TensorInfo:
    values = _check_fields(where, entry, _FIELDS)
    try:
        spec = QuantSpec(**_check_fields(f"{where}: spec", values["spec"], _SPEC_FIELDS))
    except ConfigError as error:
        raise FormatError(f"{where}: spec: {error}") from error
    dtype, container = values["dtype"], values["container"]
    _check_choice(f"{where}: dtype", dtype, tuple(LOGICAL_DTYPES))
    _check_choice(f"{where}: container", container, get_args(Container))
    parts = _parse_parts(where, name, values["parts"], stored)
    info = TensorInfo((), LOGICAL_DTYPES[dtype], spec, container, parts)
    shape = (*parts["packed"].shape[:-1], spec.dim)
    if not isinstance(values["shape"], list) or values["shape"] != list(shape):
        raise FormatError(
            f"{where}: shape must be {list(shape)}, by the shape of its packed codes; got "
            f"{_short(values['shape'])}"
        )
    _check_layout(where, info)
    return dataclasses.replace(info, shape=shape)


def _check_choice(where: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise FormatError(f"{where} must be one of {', '.join(choices)}; got {_short(value)}")


def _parse_parts(
    where: str, name: str, value: object, stored: Mapping[str, Part]
) -> dict[str, Part]:
    known = isinstance(value, list) and all(isinstance(p, str) and p in PARTS for p in value)
    if not known or len(set(value)) != len(value) or not set(REQUIRED_PARTS) <= set(value):  # type: ignore[call-overload,arg-type]
        raise FormatError(
            f"{where}: parts must list {' and '.join(REQUIRED_PARTS)}, and may list shift and "
            f"equalizer; got {_short(value)}"
        )
    parts = {}
    for part in PARTS:
        if part in value:  # type: ignore[operator]
            key = key_of(name, part)
            if key not in stored:
                raise FormatError(f"{where}: the array {key!r} is missing from the file")
            parts[part] = stored[key]
    return parts


def _check_layout(where: str, info: TensorInfo) -> None:
    """Check that the stored arrays have the dtypes and shapes that the spec asks for."""
    try:
        build(info, {part: meta_tensor(p) for part, p in info.parts.items()})
    except InputError as error:
        raise FormatError(f"{where}: {error}") from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        # torch cannot hold an array of this shape
        raise FormatError(f"{where}: impossible shape: {str(error).splitlines()[0]}") from error


def meta_tensor(part: Part) -> torch.Tensor:
    """Return a tensor of this dtype and shape without data."""
    return torch.empty(part.shape, dtype=part.dtype, device="meta")


def build(info: TensorInfo, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the tensor that loaded parts make up."""
    if info.spec is None:
        return parts[PLAIN]
    return QuantTensor(
        parts["packed"],
        parts["scales"],
        info.spec,
        shift=parts.get("shift"),
        equalizer=parts.get("equalizer"),
        dtype=info.dtype,
        container=info.container,
    )
