"""An index as one safetensors file: settings in the header, the rest as tensors."""

from __future__ import annotations

import json
from os import PathLike

import numpy as np
import torch

from quantforge.errors import FormatError
from quantforge.io import QuantFile, open_file, save_file
from quantforge.numerics.vectors import VectorCode, oblivious
from quantforge.vectordb.codec import CHUNK_ROWS, Codec
from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.core import Core

FORMAT = 2
LEARNED = ("mean", "equalizer", "basis", "step", "weights", "bits")


def save(path: str | PathLike[str], dim: int, config: IndexConfig, core: Core | None) -> None:
    """Write an index; the file takes the place of an old one whole."""
    header = {"format": FORMAT, "dim": dim, "config": config.to_dict(), "learned": core is not None}
    tensors = {}
    if core is not None:
        tensors = core.rows.parts(slice(None))
        if config.mode != "oblivious":
            code = core.codec.code
            tensors |= {name: torch.from_numpy(np.array(getattr(code, name))) for name in LEARNED}
    save_file(tensors, path, metadata={"index": json.dumps(header)})


def load(path: str | PathLike[str]) -> tuple[int, IndexConfig, Core | None]:
    """Read an index; tensors are views of the memory-mapped file.

    Raises:
        FormatError: for a damaged file, one of another kind, or one of a later version.
    """
    with open_file(path) as file:
        if "index" not in file.metadata:
            raise FormatError(f"{path} holds no index; QuantizedIndex.save writes one")
        try:
            header = json.loads(file.metadata["index"])
            version = header["format"]
            if version not in (1, FORMAT):
                raise FormatError(
                    f"{path} is an index of format {version}; this version reads 1 to {FORMAT}"
                )
            dim, config = header["dim"], IndexConfig.from_dict(header["config"])
            core = None
            if header["learned"]:
                core = _core_of(file, dim, config)
                if version == 1:
                    _offsets_of_format_1(core)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise FormatError(f"{path}: the index is damaged: {error!r}") from error
    return dim, config, core


def _core_of(file: QuantFile, dim: int, config: IndexConfig) -> Core:
    if config.mode == "oblivious":
        code = oblivious(dim, config.bits, config.seed)
    else:
        code = VectorCode(*(file[name].numpy() for name in LEARNED))
    codec = Codec(code, config.seed, squared=config.metric == "l2")
    groups = [f"packed{i}" for i in range(len(codec.groups))]
    names = [*groups, "scales", "offsets", "ids"]
    names += ["originals"] if config.originals != "none" else []
    return Core(config, codec, {name: file[name] for name in names})


def _offsets_of_format_1(core: Core) -> None:
    """Turn <mean, r> into <mean, r - r^>, and |r|^2 into its negative."""
    rows, codec = core.rows, core.codec
    if codec.squared:
        rows.put(torch.arange(len(rows)), {"offsets": -rows["offsets"]})
        return
    for index in torch.arange(len(rows)).split(CHUNK_ROWS):
        coded = rows.coded(index)
        along = (codec.decode(coded) - codec.mean) @ codec.mean / codec.unit
        rows.put(index, {"offsets": (coded.offsets.float() - along).to(torch.float16)})
