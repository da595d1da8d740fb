"""`manifest.json`: which files of a folder are the index now.

    {"quantforge_store": 1, "generation": 3, "base": "base-00000003.safetensors",
     "files": {"base-00000003.safetensors": {"bytes": 4096, "crc32": 305419896}},
     "log": "log-00000003.qf", "crc32": 2271560481}

The last entry is the checksum of the others (as JSON with sorted keys and no spaces). Replacing
this file is the one step that puts other files in their place.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantforge.errors import FormatError
from quantforge.io.atomic import replacing

VERSION = 1
NAME = "manifest.json"
PIECE = 1 << 22
_FILE_NAME = re.compile(
    r"base-\d{8}(-[0-9a-f]{8}-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|log-\d{8}\.qf"
)


@dataclass(frozen=True)
class Checksum:
    """What a file of the base must be."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """Contents of a manifest.

    Attributes:
        generation: counts the bases of a folder, from 1.
        base: the name that `QuantizedIndex.load` takes.
        files: the files that it is made of.
        log: changes since.
    """

    generation: int
    base: str
    files: dict[str, Checksum]
    log: str

    def write(self, folder: Path) -> None:
        """Put it in the place of the old one."""
        content = {"quantforge_store": VERSION, **dataclasses.asdict(self)}
        content["crc32"] = _crc_of(content)
        with replacing(folder / NAME) as file:
            file.write(json.dumps(content, indent=2).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            FormatError: if there is none, it is damaged, or of another version.
        """
        path = folder / NAME
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise FormatError(
                f"{path} is missing: {folder} holds no index store; IndexStore.create makes one"
            ) from error
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path} is damaged: {error}") from error
        if not isinstance(content, dict) or "quantforge_store" not in content:
            raise FormatError(f"{path} is not the manifest of an index store")
        version = content.pop("quantforge_store")
        if version != VERSION:
            raise FormatError(
                f"{path} is of version {version!r}; this quantforge reads {VERSION}; upgrade it if "
                "the store is newer"
            )
        crc = content.pop("crc32", None)
        if crc != _crc_of({"quantforge_store": version, **content}):
            raise FormatError(f"{path} is damaged: its checksum is not that of its contents")
        try:
            files = {name: Checksum(**entry) for name, entry in content.pop("files").items()}
            manifest = cls(files=files, **content)
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatError(f"{path} is damaged: {error!r}") from error
        for name in manifest.names:
            if not _FILE_NAME.fullmatch(name):
                raise FormatError(f"{path} names the file {name!r}, which no store has")
        return manifest

    @property
    def names(self) -> set[str]:
        """The files in use."""
        return {*self.files, self.base, self.log}

    def check_sizes(self, folder: Path) -> None:
        """Raise `FormatError` for a file of the base that is missing or of another size."""
        for name, expected in self.files.items():
            try:
                found = (folder / name).stat().st_size
            except FileNotFoundError as error:
                raise FormatError(
                    f"{folder / name} is missing; restore it from a copy of its folder"
                ) from error
            if found != expected.bytes:
                raise FormatError(f"{folder / name} must have {expected.bytes} bytes; got {found}")

    def check_contents(self, folder: Path) -> None:
        """Raise `FormatError` for a file of the base whose checksum is wrong; reads all of them."""
        self.check_sizes(folder)
        for name, expected in self.files.items():
            if (found := checksum(folder / name)) != expected:
                raise FormatError(
                    f"{folder / name} is damaged: its checksum is {found.crc32:08x}, expected "
                    f"{expected.crc32:08x}; restore it from a copy of its folder"
                )


def _crc_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def checksum(path: Path) -> Checksum:
    """Read a file and return its size and checksum."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return Checksum(size, crc)


def base_name(generation: int) -> str:
    """Return the name of the base of a generation."""
    return f"base-{generation:08d}.safetensors"


def log_name(generation: int) -> str:
    """Return the name of the log of a generation."""
    return f"log-{generation:08d}.qf"


def files_of(folder: Path, generation: int) -> list[Path]:
    """Return the files of the base of a generation: one, or shards and their index."""
    return sorted(folder.glob(f"base-{generation:08d}*"))


def leftovers(folder: Path, manifest: Manifest | None) -> list[Path]:
    """Return files of a store that its manifest, if there is one, does not name."""
    ours = re.compile(rf"{_FILE_NAME.pattern}|\.({_FILE_NAME.pattern}|{NAME})\.[0-9a-f]+\.tmp")
    keep = set() if manifest is None else manifest.names
    return [p for p in folder.iterdir() if ours.fullmatch(p.name) and p.name not in keep]
