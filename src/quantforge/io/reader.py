"""Open and load files: memory-mapped, checked before use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quantforge.errors import FormatError, InputError
from quantforge.io.header import (
    DTYPES,
    MARKER,
    Part,
    TensorInfo,
    build,
    key_of,
    meta_tensor,
    parse_infos,
)
from quantforge.io.index import Index, index_path, read_index


class _Shard:
    """One open safetensors file whose table has been checked."""

    def __init__(self, path: Path, device: str) -> None:
        try:
            self._file = safe_open(str(path), framework="pt", device=device)
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.stored = {key: self._part(path, key) for key in self._file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise FormatError(f"{path} is not a readable safetensors file: {error}") from error
        self.infos = parse_infos(str(path), self.metadata, self.stored)
        self._path = path

    def _part(self, path: Path, key: str) -> Part:
        entry = self._file.get_slice(key)
        code = entry.get_dtype()
        if code not in DTYPES:
            raise FormatError(f"{path}: array {key!r} has the unsupported dtype {code}")
        part = Part(DTYPES[code], tuple(entry.get_shape()))
        try:
            meta_tensor(part)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(
                f"{path}: array {key!r} has the impossible shape {part.shape}"
            ) from error
        return part

    def load(self, name: str) -> torch.Tensor:
        info = self.infos[name]
        try:
            parts = {part: self._file.get_tensor(key_of(name, part)) for part in info.parts}
        except SafetensorError as error:
            raise FormatError(f"{self._path}: tensor {name!r} cannot be read: {error}") from error
        return build(info, parts)

    def close(self) -> None:
        self._file.__exit__(None, None, None)


class QuantFile(Mapping[str, torch.Tensor]):
    """An open file: a mapping from names to tensors that are loaded when they are asked for.

    On CPU a loaded tensor is a view of the memory-mapped file: its pages are read when touched,
    and writing to it changes a private copy, never the file. Tensors outlive the QuantFile.

    Attributes:
        metadata: the strings given to `save_file`.
    """

    def __init__(self, shards: Iterable[_Shard]) -> None:
        self._shards = list(shards)
        self._of = {name: shard for shard in self._shards for name in shard.infos}
        first = self._shards[0].metadata
        self.metadata = {k: v for k, v in first.items() if not k.startswith(MARKER)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._of[name].load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, name: object) -> bool:  # Mapping's own would load the tensor
        return name in self._of

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype, spec and stored arrays of a tensor, without loading it."""
        return self._of[name].infos[name]

    def close(self) -> None:
        """Close the file; tensors loaded from it stay valid."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> QuantFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_file(path: str | PathLike[str], *, device: Any = "cpu") -> QuantFile:
    """Open a file, or a sharded set, without loading its tensors.

    Args:
        path: as given to `save_file`; also an index, or a single shard.
        device: where tensors are loaded to.

    Raises:
        FormatError: for a file that is damaged, truncated, from the future or not quantforge's;
            the message names the tensor and field.
        FileNotFoundError: if there is no such file.
    """
    path, device = Path(path), str(torch.device(device))
    index_file = index_path(path)
    while True:
        seen = _read_index_if_there(index_file)
        try:
            if seen is not None:
                return QuantFile(_open_shards(index_file, seen, device))
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder; give the path of a .safetensors file")
            return QuantFile([_Shard(path, device)])
        except FileNotFoundError as error:
            if _read_index_if_there(index_file) != seen:
                continue  # another process replaced the set between our two looks at it
            if seen is None:
                raise
            raise FormatError(
                f"{index_file} names a shard that is missing: {error}; restore the file or save "
                "again"
            ) from error


def _read_index_if_there(path: Path) -> Index | None:
    try:
        return read_index(path)
    except FileNotFoundError:
        return None


def _open_shards(index_file: Path, index: Index, device: str) -> list[_Shard]:
    shards = []
    for name in index.files:
        shard = _Shard(index_file.with_name(name), device)
        expected = {key for key, file in index.weight_map.items() if file == name}
        if expected != set(shard.stored):
            key = min(expected ^ set(shard.stored))
            side = "lacks" if key in expected else "also holds"
            raise FormatError(f"{index_file}: weight_map is wrong: {name} {side} {key!r}")
        shards.append(shard)
    _check_distinct(index_file, shards)
    return shards


def _check_distinct(index_file: Path, shards: list[_Shard]) -> None:
    seen: set[str] = set()
    for shard in shards:
        if twice := seen & set(shard.infos):
            raise FormatError(f"{index_file}: tensor {min(twice)!r} is in more than one shard")
        seen |= set(shard.infos)


def load_file(
    path: str | PathLike[str], *, device: Any = "cpu", names: Iterable[str] | None = None
) -> dict[str, torch.Tensor]:
    """Load the tensors of a file; what was saved quantized comes back as `QuantTensor`.

    Args:
        path: as given to `save_file`; also an index, or a single shard.
        device: where to; on "cpu" tensors are memory-mapped, so loading takes neither time nor
            memory until they are used.
        names: which tensors; all if None.

    Returns:
        name -> torch.Tensor or QuantTensor.

    Raises:
        FormatError: for a file that is damaged, truncated, from the future or not quantforge's.
        InputError: for names that the file does not have.
        FileNotFoundError: if there is no such file.

    Cost: reads the header; the data when they are first touched.
    """
    if isinstance(names, str):
        raise InputError(f"names must be a list of names; got the string {names!r}; use [names]")
    with open_file(path, device=device) as file:
        wanted = list(file) if names is None else list(names)
        unknown = [name for name in wanted if name not in file]
        if unknown:
            raise InputError(f"{path} has no tensors {unknown}; it has {sorted(file)}")
        return {name: file[name] for name in wanted}


def read_metadata(path: str | PathLike[str]) -> dict[str, str]:
    """Return the strings that were given to `save_file` as metadata."""
    with open_file(path) as file:
        return file.metadata
