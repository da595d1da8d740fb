"""An index as one safetensors file: settings in the header, the rest as tensors."""

from __future__ import annotations

import json
from os import PathLike
from typing import Any

import numpy as np
import torch

from quantforge.errors import FormatError
from quantforge.io import open_file, save_file
from quantforge.numerics.vectors import VectorCode, oblivious
from quantforge.vectordb.codec import Coded
from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.rows import Rows

FORMAT = 1
LEARNED = ("mean", "equalizer", "basis", "step", "weights", "bits")


def save(
    path: str | PathLike[str], dim: int, config: IndexConfig, code: VectorCode | None, rows: Rows
) -> None:
    """Write an index; the file takes the place of an old one whole."""
    header = {"format": FORMAT, "dim": dim, "config": config.to_dict(), "learned": code is not None}
    coded = rows.coded(slice(None))
    tensors = {f"packed{i}": part for i, part in enumerate(coded.packed)}
    tensors |= {"scales": coded.scales, "offsets": coded.offsets, "ids": rows.ids}
    if rows.originals is not None:
        tensors["originals"] = rows.originals
    if code is not None and config.mode != "oblivious":
        tensors |= {name: torch.from_numpy(np.array(getattr(code, name))) for name in LEARNED}
    save_file(tensors, path, metadata={"index": json.dumps(header)})


def load(path: str | PathLike[str]) -> tuple[int, IndexConfig, VectorCode | None, Coded, Any, Any]:
    """Read an index; tensors are views of the memory-mapped file.

    Returns:
        dim, settings, code, codes, ids and originals.

    Raises:
        FormatError: for a damaged file, one of another kind, or one of a later version.
    """
    with open_file(path) as file:
        if "index" not in file.metadata:
            raise FormatError(f"{path} holds no index; QuantizedIndex.save writes one")
        try:
            header = json.loads(file.metadata["index"])
            version = header["format"]
            if version != FORMAT:
                raise FormatError(
                    f"{path} is an index of format {version}; this version reads {FORMAT}"
                )
            dim, config = header["dim"], IndexConfig.from_dict(header["config"])
            names = sorted(name for name in file if name.startswith("packed"))
            packed = tuple(file[f"packed{i}"] for i in range(len(names)))
            coded = Coded(packed, file["scales"], file["offsets"])
            ids, originals = file["ids"], file.get("originals")
            code = None
            if header["learned"] and config.mode == "oblivious":
                code = oblivious(dim, config.bits, config.seed)
            elif header["learned"]:
                code = VectorCode(*(file[name].numpy() for name in LEARNED))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise FormatError(f"{path}: the index is damaged: {error!r}") from error
    return dim, config, code, coded, ids, originals
