"""What belongs to vectors and comes in a file of its own: ids and metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from quantforge.cli.common import CommandError

TABLES = (".parquet", ".arrow", ".feather")


def read_ids(path: Path) -> Any:
    """Read ids: a .npy file, or text with one on each line.

    Raises:
        CommandError: for an empty line.
        FormatError: for a damaged .npy file.
    """
    if path.suffix == ".npy":
        from quantforge.arrays import open_npy

        array = np.asarray(open_npy(path))
        return array.tolist() if array.dtype.kind == "U" else array
    return parse_ids(path.read_text("utf-8").splitlines(), str(path))


def parse_ids(words: list[str], where: str) -> Any:
    """Return int64 ids if all words are whole numbers, else the words."""
    words = [word.strip() for word in words]
    if "" in words:
        raise CommandError(f"{where}: line {words.index('') + 1} is empty; it must hold an id")
    if not all(word.isascii() and word.removeprefix("-").isdigit() for word in words):
        return words
    try:
        return np.array([int(word) for word in words], np.int64)
    except OverflowError as error:
        raise CommandError(f"{where}: ids that are numbers must be below 2^63") from error


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """Read metadata: JSON lines, or a Parquet or Arrow table, whose nested columns are left out.

    Raises:
        CommandError: for a line that is no JSON object.
        FormatError: for a damaged table.
        UnsupportedError: for a table, if pyarrow is not installed.
    """
    if path.suffix.lower() in TABLES:
        from quantforge.inputs.arrow import read_rows

        return read_rows(path)
    rows = []
    with open(path, encoding="utf-8") as file:
        for i, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise CommandError(
                    f'{path}: line {i} must be a JSON object such as {{"year": 2020}}; got '
                    f"{line.strip()!r:.60}"
                )
            rows.append(row)
    return rows
