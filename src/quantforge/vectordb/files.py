"""An index as one safetensors file: settings in the header, the rest as tensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantforge.errors import ConfigError, FormatError
from quantforge.io import QuantFile, open_file, save_file
from quantforge.numerics.vectors import VectorCode, oblivious, theoretical_errors
from quantforge.vectordb.catalog import Catalog
from quantforge.vectordb.codec import CHUNK_ROWS, Codec
from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.core import Core
from quantforge.vectordb.drift import Monitor
from quantforge.vectordb.lists import Lists, Partition
from quantforge.vectordb.originals import OriginalsFile
from quantforge.vectordb.sound import check_learned, check_lists, check_partition, check_parts

FORMAT = 2
LEARNED = ("mean", "equalizer", "basis", "step", "weights", "bits", "errors")
LISTS = ("centroids", "curve", "starts", "tail")


def save(
    path: str | PathLike[str],
    dim: int,
    config: IndexConfig,
    core: Core | None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write an index; the file, or shards, take the place of an old one whole."""
    header = {"format": FORMAT, "dim": dim, "config": config.to_dict(), "learned": core is not None}
    tensors = {}
    if core is not None:
        tensors = core.rows.parts(slice(None))
        code = core.codec.code
        names = LEARNED if config.mode != "oblivious" else ("errors",)
        tensors |= {name: torch.from_numpy(np.array(getattr(code, name))) for name in names}
        header |= {"coded": core.partition.coded, "nprobe": core.partition.nprobe}
        header["mode"] = core.codec.mode
        if core.file is not None:
            header["originals"] = _name_from(Path(path), core.file.path)
        lists = {"starts": core.lists.starts, "tail": core.lists.tail}
        lists |= {name: getattr(core.partition, name) for name in ("centroids", "spreads", "curve")}
        tensors |= {f"lists.{name}": part for name, part in lists.items()}
        tensors |= core.catalog.tensors() | core.monitor.tensors()
        header["catalog"] = core.catalog.settings()
    metadata = {"index": json.dumps(header)}
    tensors = {name: part.cpu() for name, part in tensors.items()}
    save_file(tensors, path, metadata=metadata, max_shard_size=max_shard_size)


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
                core = _core_of(Path(path), file, dim, config, header)
                if version == 1:
                    _offsets_of_format_1(core)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise FormatError(f"{path}: the index is damaged: {error!r}") from error
    return dim, config, core


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Say which file does not hold together."""
    try:
        yield
    except (FormatError, ConfigError) as error:
        raise FormatError(f"{path}: the index is damaged: {error}") from error


def _name_from(path: Path, other: Path) -> str:
    """Return how an index at path names another file: one beside it by its name alone."""
    other = other.resolve()
    return other.name if other.parent == path.resolve().parent else str(other)


def _originals_of(path: Path, name: str, dim: int, config: IndexConfig) -> OriginalsFile:
    where = path.parent / name
    try:
        found = OriginalsFile(where)
    except FileNotFoundError as error:
        raise FormatError(
            f"{where} is missing: it holds the originals of {path}; put it there again"
        ) from error
    if (found.dim, found.kind) != (dim, config.originals):
        raise FormatError(
            f"{where} holds {found.kind} vectors of dim {found.dim}; {path} needs "
            f"{config.originals} of dim {dim}"
        )
    return found


def _core_of(
    path: Path, file: QuantFile, dim: int, config: IndexConfig, header: dict[str, Any]
) -> Core:
    learned = {name: file[name].numpy() for name in LEARNED if name in file}
    with _damage(path):
        check_learned(learned, dim)
    partition, lists = Partition.single(dim), None
    if header["format"] > 1:
        found = {name: file[f"lists.{name}"] for name in LISTS}
        centroids = found["centroids"]
        spreads = torch.zeros(len(centroids))  # older files do not say
        if "lists.spreads" in file:
            spreads = file["lists.spreads"]
        partition = Partition(centroids, spreads, header["coded"], found["curve"], header["nprobe"])
        with _damage(path):
            check_partition(partition, dim)
        lists = Lists(len(centroids), found["starts"], found["tail"])
    if config.mode == "oblivious":
        code = dataclasses.replace(oblivious(dim, config.bits, config.seed), **learned)
    else:
        if "errors" not in learned:
            learned["errors"] = theoretical_errors(learned["weights"], learned["bits"])
        code = VectorCode(**learned)
    centres = partition.centroids if partition.coded else None
    squared = config.metric == "l2"
    mode = header.get("mode", config.mode)
    codec = Codec(code, mode, config.seed, squared=squared, centres=centres)
    groups = [f"packed{i}" for i in range(len(codec.groups))]
    names = [*groups, "scales", "offsets", "ids"]
    if config.originals != "none":
        names.append("places" if "originals" in header else "originals")
    parts = {name: file[name] for name in names}
    with _damage(path):
        check_parts(parts, codec, dim)
        if lists is not None:
            check_lists(lists, len(parts["ids"]))
    if lists is None:
        lists = Lists.of(torch.zeros(len(parts["ids"]), dtype=torch.int64), 1)
    core = Core(config, codec, partition, parts, lists)
    with _damage(path):
        core.monitor = Monitor(dim, config.seed, file)
    if "originals" in header:
        core.file = _originals_of(path, header["originals"], dim, config)
    if "catalog" in header:
        with _damage(path):
            core.catalog = Catalog.load(core.rows.growing("ids"), header["catalog"], file)
    elif len(core.rows):
        core.catalog.ids.next_id = int(core.rows.ids.max()) + 1
    return core


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
