"""Save tensors, in one file or in shards."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch

from quantforge.dispatch.layout import plain
from quantforge.errors import InputError
from quantforge.io.header import check_names, info_of, key_of, make_metadata
from quantforge.io.index import (
    check_target,
    group,
    index_path,
    parse_size,
    remove,
    shard_names,
    stale_shards,
    write_index,
)
from quantforge.io.writer import check_value, create_file
from quantforge.tensor import QuantTensor


def save_file(
    tensors: Mapping[str, torch.Tensor],
    path: str | PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Save plain and quantized tensors to a safetensors file, codes and all.

    The new file replaces an old one in a single step: a failure or a kill leaves the old one.

    Args:
        tensors: name -> torch.Tensor or QuantTensor, any device.
        path: of the file; with shards, the name that `load_file` takes: the shards and
            `<path>.index.json` lie beside it.
        metadata: strings of your own for the header; keys beginning with "quantforge" are
            reserved.
        max_shard_size: bytes, or text such as "5GB"; tensors beyond it go to further files. The
            parts of one tensor stay together, so one large tensor may exceed it.

    Raises:
        InputError: for names that collide, unsupported dtypes, transposed QuantTensors, or
            metadata that are not strings. Nothing has been written then.
    """
    if not isinstance(tensors, Mapping):
        raise InputError(
            f"tensors must map names to tensors; got {type(tensors).__name__}; use "
            "save_file({'vectors': tensor}, path)"
        )
    path = check_target(path)
    values = {name: _materialized(name, value) for name, value in tensors.items()}
    infos = {name: info_of(value) for name, value in values.items()}
    check_names(infos)
    metadata = metadata or {}
    make_metadata(infos, metadata)  # raises before the first byte is written
    groups = [list(values)] if max_shard_size is None else group(infos, parse_size(max_shard_size))
    if len(groups) == 1:
        _write(values, path, metadata)
    else:
        _write_shards([{name: values[name] for name in names} for names in groups], path, metadata)


def _materialized(name: str, value: torch.Tensor) -> torch.Tensor:
    if isinstance(value, QuantTensor):
        if value._transposed:
            raise InputError(
                f"{name!r} is a transposed QuantTensor; files hold vectors as rows: save "
                f"tensors[{name!r}].mT and transpose after loading"
            )
        value = plain(value)
    check_value(name, value)
    if value.device.type == "meta":
        raise InputError(f"{name!r} is on the meta device and has no data to save")
    return value


def _write(values: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    with create_file(path, values, metadata=metadata) as file:
        for name, value in values.items():
            file.write(name, value)


def _write_shards(
    shards: list[dict[str, torch.Tensor]], path: Path, metadata: Mapping[str, str]
) -> None:
    names = shard_names(path, len(shards))
    files = [path.with_name(name) for name in names]
    weight_map: dict[str, str] = {}
    total = 0
    try:
        for file, values in zip(files, shards, strict=True):
            _write(values, file, metadata)
            for name, info in ((name, info_of(value)) for name, value in values.items()):
                weight_map |= {key_of(name, part): file.name for part in info.parts}
                total += info.nbytes
        stale = [*stale_shards(path), path]
        write_index(index_path(path), weight_map, total)
    except BaseException:
        named = stale_shards(path)  # the new files, if the index was switched before the failure
        remove(file for file in files if file not in named)
        raise
    remove(stale)
