"""Sharded files: which tensor goes where, the index, and how one set replaces another.

`model.safetensors.index.json` names the shards, as transformers writes it:

    {"metadata": {"quantforge": "2", "total_size": 123}, "weight_map": {"k.packed": "model-..."}}

An index wins over a single file of the same name. So writing (or removing) the index is the one
moment at which the new set takes over; shards have new names each time, and the old ones are
removed afterwards.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from quantforge.errors import FormatError, InputError
from quantforge.io.atomic import replacing, sync_folder
from quantforge.io.header import MARKER, VERSION, TensorInfo, check_version, parse_json

INDEX_SUFFIX = ".index.json"
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{unit}B": 1000**i for i, unit in enumerate("KMGT", 1)}
_UNITS |= {f"{unit}iB": 1024**i for i, unit in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Index:
    """Contents of an index file: key of each array -> file name in the same folder."""

    weight_map: Mapping[str, str]

    @property
    def files(self) -> list[str]:
        """The shards, in order."""
        return sorted(set(self.weight_map.values()))


def check_target(path: str | PathLike[str]) -> Path:
    """Return the path of a file to write."""
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        raise InputError(
            f"{path.name} is the name of an index; give the name before {INDEX_SUFFIX!r}, the "
            "index is written beside the shards"
        )
    return path


def index_path(path: Path) -> Path:
    """Return where the index of a sharded `path` lies."""
    return path if path.name.endswith(INDEX_SUFFIX) else path.with_name(path.name + INDEX_SUFFIX)


def parse_size(size: int | str) -> int:
    """Return bytes of "5GB", "200 MiB" or a plain number.

    Raises:
        InputError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise InputError(
            f"max_shard_size must be a positive number of bytes, or text such as '5GB' or "
            f"'200MiB' (units: {', '.join(u for u in _UNITS if u)}); got {size!r}"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def group(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Cut the names into shards; all parts of a tensor share one, however large."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, info in infos.items():
        if groups[-1] and used + info.nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += info.nbytes
    return groups


def shard_names(path: Path, count: int) -> list[str]:
    """Return new names `model-1f3a9c02-00001-of-00003.safetensors` for the shards of a save."""
    token = secrets.token_hex(4)
    stem, suffix = (path.stem, path.suffix) if path.suffix == ".safetensors" else (path.name, "")
    return [f"{stem}-{token}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]


def read_index(path: Path) -> Index:
    """Read an index.

    Raises:
        FormatError: if it is damaged, not quantforge's, or names files outside its folder.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text: {error}") from error
    content = parse_json(str(path), text)
    metadata, weight_map = content.get("metadata"), content.get("weight_map")
    if not isinstance(metadata, dict):
        raise FormatError(f"{path}: field 'metadata' must be an object; got {metadata!r:.80}")
    check_version(str(path), metadata)
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: field 'weight_map' must be a non-empty object")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _is_file_name(name):
            raise FormatError(
                f"{path}: weight_map[{key!r}] must be the name of a file in the same folder; got "
                f"{name!r:.80}"
            )
    return Index(weight_map)


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and not re.search(r"[/\\:\0]|[\ud800-\udfff]", name)


def write_index(path: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Replace the index; from here on readers see the new shards."""
    content = {
        "metadata": {MARKER: VERSION, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2).encode())


def stale_shards(path: Path) -> list[Path]:
    """Return the shards that the index at `path` names now: stale once it is replaced."""
    try:
        return [path.parent / name for name in read_index(index_path(path)).files]
    except (FormatError, FileNotFoundError):
        return []  # nothing there, or not ours to remove


def retire(path: Path) -> None:
    """Let the single file at `path`, complete by now, take over from a sharded set."""
    index = index_path(path)
    if not index.exists():
        return
    stale = stale_shards(path)
    index.unlink(missing_ok=True)
    sync_folder(path.parent)
    remove(stale)


def remove(paths: Iterable[Path]) -> None:
    """Remove files that no index names any more."""
    for path in paths:
        path.unlink(missing_ok=True)
