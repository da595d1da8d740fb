"""A worker's share of a folder, and the records by which everyone knows what is done.

    OUTPUT/a/b.npy.safetensors          what `quantforge compress a/b.npy` writes
    OUTPUT/.encode/settings.json        the code of all of them
    OUTPUT/.encode/a/b.npy.json         a record: from which bytes it was made, or why it was not

Worker r of w takes every w-th file from the r-th on, in the order of names. Files and records
appear whole or not at all, the record last.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantforge.config import QuantForgeConfig
from quantforge.errors import InputError, QuantForgeError
from quantforge.inputs import SUFFIXES, open_vectors
from quantforge.io.atomic import replacing
from quantforge.pipeline import QuantPipeline

logger = logging.getLogger(__name__)

RECORDS = ".encode"
SECONDS_BETWEEN_REPORTS = 10.0


class Progress(NamedTuple):
    """What all workers have done.

    Attributes:
        files: in the input folder.
        done: of them, compressed.
        failed: name and reason of those that could not be.
    """

    files: int
    done: int
    failed: dict[str, str]

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to try."""
        return self.done + len(self.failed) == self.files

    def __str__(self) -> str:
        return f"{self.done} of {self.files} files done, {len(self.failed)} failed"


def encode_folder(
    source: Path,
    output: Path,
    config: QuantForgeConfig | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    name: str | None = None,
    device: torch.device | str | None = None,
) -> dict[str, str]:
    """Compress this worker's share of the files below a folder; what is done already is left.

    A shift or an equalizer is measured for each file by itself, and lies in it. One job at a time
    may write to an output folder.

    Args:
        source: folder of files of vectors, in folders of their own or not.
        output: folder for the results.
        config: the code.
        rank: of this worker, from 0.
        world: number of workers.
        name: of the array, where files hold several.
        device: where to compute; the CPU if None.

    Returns:
        Why files of this worker could not be compressed, by name; the others are done.

    Raises:
        InputError: for a rank outside the world, a folder without files of vectors, or an output
            folder that was begun with another code.
    """
    if not 0 <= rank < world:
        raise InputError(f"rank must be from 0 to world - 1 = {world - 1}; got {rank}")
    config = QuantForgeConfig() if config is None else config
    names = _names(source, output)
    _check_settings(output, {"config": dataclasses.asdict(config), "name": name})
    mine = names[rank::world]
    for file in mine:
        _clear(source, output, file)
    failed: dict[str, str] = {}
    reported = time.monotonic()
    for file in mine:
        if _is_done(source, output, file):
            continue
        try:
            record = _encode(source, output, file, config, name, device)
        except (QuantForgeError, OSError) as error:
            failed[file] = str(error)
            record = {"error": str(error)}
            logger.error("%s: %s", source / file, error)
        _write_json(_record(output, file), record)
        if time.monotonic() - reported > SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            logger.info("%s", progress(source, output))
    return failed


def progress(source: Path, output: Path) -> Progress:
    """Count what all workers have done.

    Raises:
        InputError: for a folder without files of vectors.
    """
    done, failed, names = 0, {}, _names(source, output)
    for file in names:
        if _is_done(source, output, file):
            done += 1
        elif error := _read_json(_record(output, file)).get("error"):
            failed[file] = error
    return Progress(len(names), done, failed)


def _names(source: Path, output: Path) -> list[str]:
    """Return the files of vectors below a folder, but for our own, in an order all agree on."""

    def found() -> Iterator[str]:
        for path in source.rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
            ours = path.is_relative_to(output) and output != source
            if path.suffix.lower() in SUFFIXES and path.is_file() and not (hidden or ours):
                yield path.relative_to(source).as_posix()

    if output.resolve() == source.resolve():
        raise InputError(f"results cannot go into the folder of the input, {source}; name another")
    names = sorted(found())
    if not names:
        raise InputError(f"{source} holds no files of vectors, which end in {', '.join(SUFFIXES)}")
    return names


def _target(output: Path, file: str) -> Path:
    return output / f"{file}.safetensors"


def _record(output: Path, file: str) -> Path:
    return output / RECORDS / f"{file}.json"


def _origin(path: Path) -> dict[str, int]:
    """Return what tells whether a file is the one that was read."""
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_done(source: Path, output: Path, file: str) -> bool:
    record, target = _read_json(_record(output, file)), _target(output, file)
    return (
        record.get("origin") == _origin(source / file)
        and target.is_file()
        and record.get("bytes") == target.stat().st_size
    )


def _encode(
    source: Path,
    output: Path,
    file: str,
    config: QuantForgeConfig,
    name: str | None,
    device: torch.device | str | None,
) -> dict[str, Any]:
    target, start = _target(output, file), time.perf_counter()
    origin = _origin(source / file)
    array = open_vectors(source / file, name=name)
    target.parent.mkdir(parents=True, exist_ok=True)
    pipeline = QuantPipeline(int(array.shape[-1]), config)
    pipeline.compress_file(array, target, device=device, progress=False)
    return {
        "origin": origin,
        "bytes": target.stat().st_size,
        "shape": list(array.shape),
        "seconds": round(time.perf_counter() - start, 3),
    }


def _clear(source: Path, output: Path, file: str) -> None:
    """Remove what a killed worker left of a file, and why it failed before: it is tried again."""
    for path in (_target(output, file), _record(output, file)):
        # a name may hold the signs of a pattern
        for left in path.parent.iterdir() if path.parent.is_dir() else ():
            if left.name.startswith(f".{path.name}.") and left.suffix == ".tmp":
                left.unlink(missing_ok=True)
    if not _is_done(source, output, file):
        _record(output, file).unlink(missing_ok=True)


def _check_settings(output: Path, asked: dict[str, Any]) -> None:
    path = output / RECORDS / "settings.json"
    found = _read_json(path)
    if found and found != asked:
        raise InputError(
            f"{output} was begun with {found}, and is asked for {asked} now; use that, or another "
            "output folder"
        )
    if not found:  # workers that begin together write the same
        _write_json(path, asked)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return dict(json.loads(path.read_text("utf-8")))
