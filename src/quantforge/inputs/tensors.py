"""safetensors files, plain ones and quantforge's; tensors are views of the mapped file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantforge.errors import FormatError
from quantforge.inputs.entry import Entry
from quantforge.io import open_file
from quantforge.io.header import DTYPES, MARKER
from quantforge.io.index import INDEX_SUFFIX, index_path


def tensor_entries(path: Path) -> dict[str, Entry]:
    """List the tensors of a file, or of a sharded set of quantforge's.

    Raises:
        FormatError: if it is damaged.
    """
    if path.name.endswith(INDEX_SUFFIX) or index_path(path).exists():
        return _quantized_entries(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            if MARKER in (file.metadata() or {}):
                return _quantized_entries(path)
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {
                key: Entry(tuple(s.get_shape()), _name(s.get_dtype()), partial(_load, path, key))
                for key, s in slices.items()
            }
    except SafetensorError as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}") from error


def _name(code: str) -> str:
    return str(DTYPES[code]).removeprefix("torch.") if code in DTYPES else code


def _load(path: Path, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        code = file.get_slice(key).get_dtype()
        if code not in DTYPES:
            raise FormatError(f"{path}: array {key!r} has the unsupported dtype {code}")
        return file.get_tensor(key)


def _quantized_entries(path: Path) -> dict[str, Entry]:
    def load(name: str) -> Any:
        with open_file(path) as file:
            return file[name]

    with open_file(path) as file:
        infos = {name: file.info(name) for name in file}
    return {
        name: Entry(
            info.shape, str(info.dtype).removeprefix("torch."), partial(load, name), info.spec
        )
        for name, info in infos.items()
    }
