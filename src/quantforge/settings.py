"""Files of settings: JSON with a section for each kind of thing that has some.

    {
      "quantforge_settings": 1,
      "vectors": {"bits": 3, "rotation": "auto", ...},     QuantForgeConfig.from_file
      "index": {"bits": 4, "mode": "adapted", ...},        vectordb.IndexConfig.from_file
      "cache": {"bits": [4, 3], "layers": {"0": {...}}}    QuantForgeCache.from_file
    }

A file has one section or more; who reads one leaves the others alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from quantforge.errors import ConfigError, FormatError

MARK = "quantforge_settings"
VERSION = 1
SECTIONS = ("vectors", "index", "cache")

T = TypeVar("T")


def write(path: str | os.PathLike[str], sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Write sections into a file, which takes the place of an old one whole."""
    target = Path(path)
    text = json.dumps({MARK: VERSION, **{k: dict(v) for k, v in sections.items()}}, indent=1)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text + "\n", "utf-8")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], section: str, build: Callable[[dict[str, Any]], T]) -> T:
    """Return what `build` makes of a section.

    Args:
        path: of the file.
        section: one of SECTIONS.
        build: takes the section's values; its ConfigErrors are raised with file and section.

    Raises:
        FormatError: if the file is no such JSON, of a later version, or lacks the section.
        ConfigError: for a setting that does not exist or has a bad value; it names both.
    """
    found = _sections(Path(path))
    if section not in found:
        raise FormatError(f"{path} has no section {section!r}; it has {sorted(found)}")
    values = found[section]
    if not isinstance(values, dict):
        raise FormatError(f"{path}: {section!r} must be an object of settings; got {values!r}")
    try:
        return build(values)
    except ConfigError as error:
        raise ConfigError(f"{path}, section {section!r}: {error}") from error


def _sections(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or MARK not in content:
        raise FormatError(
            f'{path} has no settings: they begin with "{MARK}": {VERSION} and have one of the '
            f"sections {', '.join(SECTIONS)}"
        )
    version = content.pop(MARK)
    if version != VERSION:
        raise FormatError(f"{path}: {MARK} must be {VERSION}; got {version!r}, a later version?")
    return content
