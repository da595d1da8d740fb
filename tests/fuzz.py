"""Damaged files for every reader, and bodies for the server: refused by name, or read.

    python -m tests.fuzz --cases 1000000 --http 100000 --output benchmarks/results/fuzz.json
    python -m tests.fuzz --cases 1000000 --output FILE --resume       goes on where FILE ends
    python -m tests.fuzz --seed 0 --start 4711 --cases 1              one case once more

Case i of a seed is always the same. A case fails with an exception that is neither a
QuantForgeError nor an OSError, when it takes longer than MAX_SECONDS, and when the peak of memory
has grown by more than MAX_GROWTH. The address space is limited, so a case cannot take the machine
down; a crash or a hang of native code ends the run and names its case.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.record import environment
from quantforge import (
    QuantForgeConfig,
    QuantForgeError,
    QuantPipeline,
    QuantTensor,
    load_file,
    save_file,
)
from quantforge.inputs import open_vectors
from quantforge.inputs.arrow import read_rows
from quantforge.io.npz import load_npz
from quantforge.llm import QuantForgeCache
from quantforge.vectordb import IndexConfig, IndexStore, QuantizedIndex
from tests.helpers import gaussian
from tests.inputs.test_inputs import WRITERS, X, records
from tests.limits import limited_address_space, limited_time
from tests.mutations import mutated, mutated_json, mutated_safetensors
from tests.server.fuzz import MAX_GROWTH, MAX_SECONDS, MiB, peak_bytes, run_server

ADDRESS_SPACE = 8 * 1024 * MiB
"""Beyond what the process has when the cases begin."""

GOLDEN = Path(__file__).parent / "golden"
DIM = 8
ROWS = 40
PART = 10_000
"""Cases after which what became of them is written down."""


class Reader(NamedTuple):
    """One kind of file.

    Attributes:
        target: the file that is damaged, in a folder with `files`.
        files: good files by name.
        read: reads the folder, as far as it can.
    """

    target: str
    files: dict[str, bytes]
    read: Callable[[Path], object]


def _vectors(path: Path) -> None:
    array = open_vectors(path)
    array.dequantize() if hasattr(array, "dequantize") else (array[:3], array[-2:])


def _tensors(path: Path) -> None:
    for value in load_file(path).values():
        value.dequantize() if hasattr(value, "dequantize") else value.float().sum()


def _index(path: Path) -> None:
    index = QuantizedIndex.load(path)
    found, _ = index.search(gaussian(2, index.dim), 3)
    index.remove_ids(found[0, :1])


def _store(folder: Path) -> None:
    with IndexStore.open(folder, read_only=True) as store:
        store.index.search(gaussian(2, DIM), 3)


def _settings(path: Path) -> None:
    refused = 0
    for read in (QuantForgeConfig.from_file, IndexConfig.from_file, QuantForgeCache.from_file):
        try:
            read(path)
        except QuantForgeError:
            refused += 1
    if refused:
        raise QuantForgeError("refused")


def readers() -> dict[str, Reader]:
    """Return every reader, with good files made now or kept in tests/golden."""
    found = {}

    def add(name: str, path: Path, read: Callable[[Path], object]) -> None:
        found[name] = Reader(
            path.name, {path.name: path.read_bytes()}, lambda f: read(f / path.name)
        )

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        x = X[:ROWS]
        for name, write in WRITERS.items():
            write(folder / name, x)
        QuantPipeline(16).compress_file(x, folder / "ours.npz")
        records(folder / "x.bvecs", x.astype(np.uint8), "u1")
        for path in sorted(folder.iterdir()):
            add(f"vectors {path.name}", path, _vectors)
        for name in ("fixed.parquet", "file.arrow", "stream.arrow"):
            add(f"rows {name}", folder / name, read_rows)
        sections = {"vectors": QuantForgeConfig().to_dict(), "index": IndexConfig().to_dict(),
                    "cache": {"bits": [4, 3], "layers": {"0": {"bits": 8}}}}  # fmt: skip
        settings = folder / "settings.json"
        settings.write_text(json.dumps({"quantforge_settings": 1, **sections}))
        add("settings", settings, _settings)
        found |= _shards(folder / "shards") | _stores(folder / "store")
        add("npz", folder / "ours.npz", load_npz)
    for path in sorted(GOLDEN.glob("format_*.safetensors")):
        add(f"tensors {path.name}", path, _tensors)
    for path in sorted(GOLDEN.glob("index_*.safetensors")):
        add(f"index {path.name}", path, _index)
    for path in sorted(GOLDEN.glob("cache_*.safetensors")):
        add(f"cache {path.name}", path, QuantForgeCache.load)
    return found


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _shards(folder: Path) -> dict[str, Reader]:
    folder.mkdir()
    x = QuantTensor.quantize(torch.from_numpy(gaussian(6, DIM)), QuantForgeConfig(bits=3))
    save_file({"a": x, "b": x.clone()}, folder / "m.safetensors", max_shard_size=64)
    target = "m.safetensors.index.json"
    return {"shards": Reader(target, _contents(folder), lambda f: _tensors(f / "m.safetensors"))}


def _stores(folder: Path) -> dict[str, Reader]:
    with IndexStore.create(folder, DIM, IndexConfig(mode="oblivious")) as store:
        store.add(gaussian(20, DIM), metadata={"year": list(range(20))})
        store.compact()
        store.add(gaussian(4, DIM, seed=1), ids=[100, 101, 102, 103])
        store.remove_ids([3])
    files = _contents(folder)
    files.pop("lock", None)
    targets = {"manifest": ".json", "base": ".safetensors", "log": ".qf"}
    return {
        f"store {name}": Reader(next(n for n in files if n.endswith(suffix)), files, _store)
        for name, suffix in targets.items()
    }


def damaged(rng: random.Random, name: str, body: bytes) -> bytes:
    """Return a bad file: of bytes that changed, or of a header that says something else."""
    if rng.random() < 0.5:
        if name.endswith(".safetensors"):
            return mutated_safetensors(rng, body)
        if name.endswith(".json"):
            return mutated_json(rng, body)
    return mutated(rng, body)


# ---- running -------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of the cases.

    Attributes:
        cases: how many there were.
        read: cases by reader that were read in spite of all.
        refused: likewise refused.
        failures: by the line that failed: reader and error of the first case, and the cases.
    """

    cases: int = 0
    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_to(self, files: dict[str, Any]) -> None:
        """Count these cases in what is written of those before them."""
        files["cases"] += self.cases
        for name in files["read"]:
            files["read"][name] += self.read[name]
            files["refused"][name] += self.refused[name]
        for key, entry in self.failures.items():
            known = files["failures"].setdefault(key, {**entry, "cases": []})
            known["cases"] += entry["cases"]

    def fail(self, case: int, name: str, error: BaseException) -> None:
        """Count a failure."""
        frames = traceback.extract_tb(error.__traceback__)[-1:]
        where = [f" {Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        key = type(error).__name__ + "".join(where)
        entry = self.failures.setdefault(
            key, {"reader": name, "error": str(error)[:300], "cases": []}
        )
        entry["cases"].append(case)


def run(
    kinds: dict[str, Reader],
    seed: int,
    cases: Iterable[int],
    folder: Path,
    started: Callable[[int], object] = lambda case: None,
) -> Outcome:
    """Read damaged files, each kind in turn.

    Args:
        kinds: by name.
        seed: of all cases.
        cases: their numbers; the same number is the same case.
        folder: for the files, best in memory.
        started: called with the number of each case.
    """
    outcome, names = Outcome(), sorted(kinds)
    for kind in kinds.values():
        kind.read(_written(folder, kind.files))  # it is good, and tables are made once
    before = peak_bytes()
    for case in cases:
        started(case)
        outcome.cases += 1
        name = names[case % len(names)]
        kind, rng = kinds[name], random.Random(f"{seed} {case}")
        bad = damaged(rng, kind.target, kind.files[kind.target])
        here = _written(folder, {**kind.files, kind.target: bad})
        try:
            with warnings.catch_warnings(), limited_time(MAX_SECONDS):
                warnings.simplefilter("ignore")  # numpy warns of headers that Python 2 wrote
                kind.read(here)
            outcome.read[name] += 1
        except (QuantForgeError, OSError):
            outcome.refused[name] += 1
        except (Exception, AssertionError) as error:
            outcome.fail(case, name, error)
        if (peak := peak_bytes()) - before > MAX_GROWTH:
            outcome.fail(case, name, MemoryError(f"peak grew by {(peak - before) / MiB:.0f} MiB"))
            before = peak
    return outcome


def _written(folder: Path, files: dict[str, bytes]) -> Path:
    place = str(folder)
    for name in os.listdir(place):
        os.unlink(f"{place}/{name}")  # what is mapped stays as it was
    for name, content in files.items():
        with open(f"{place}/{name}", "wb", 0) as file:
            file.write(content)
    return folder


def main() -> None:
    """Run all cases and write what became of them; exit 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of files")
    parser.add_argument("--start", type=int, default=0, help="number of the first")
    parser.add_argument("--resume", action="store_true", help="count on from --output, up to cases")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for files at most")
    parser.add_argument("--http", type=int, default=0, help="bodies sent to a server as well")
    parser.add_argument("--only", default="", help="readers whose name begins so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON, written after each part")
    args = parser.parse_args()
    if args.resume and args.output is None:
        parser.error("--resume needs the --output to go on with")
    faulthandler.enable()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"environment": environment("cpu"), "seed": args.seed}
    if args.resume:
        result = resumed(args.output, args.seed)
    cases = range(args.start, args.start + args.cases)
    run_files(result, args.only, cases, args.seconds, args.output)
    if args.http:
        result["http"] = run_server(args.http, args.seed)
    write(result, args.output)
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["files"]["failures"] else 0)


def resumed(output: Path, seed: int) -> dict[str, Any]:
    """Return what a run has written, to go on with; `SystemExit` for one of another seed."""
    found: dict[str, Any] = json.loads(output.read_text())
    if found["seed"] != seed:
        raise SystemExit(f"{output} is of seed {found['seed']}; go on with --seed {found['seed']}")
    here = environment("cpu")
    commits = dict.fromkeys([*found["environment"]["commit"].split(", "), here["commit"]])
    return found | {"environment": here | {"commit": ", ".join(commits)}}


def write(result: dict[str, Any], output: Path | None) -> None:
    """Write a result whole, so that an end at any moment leaves the last one."""
    if output is not None:
        part = output.with_name(f".{output.name}")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(output)


def run_files(
    result: dict[str, Any], only: str, cases: range, seconds: float, output: Path | None
) -> None:
    """Run the cases that `result["files"]` has not had yet; it is written after each part.

    What failed before is run again: failures that are none any more become `mended`.
    """
    until = time.monotonic() + seconds
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as text:
        folder = Path(text) / "case"
        folder.mkdir()
        note = os.open(Path(text) / "number", os.O_WRONLY | os.O_CREAT)
        print(f"after a crash, {text}/number has the number of its case", file=sys.stderr)

        def started(case: int) -> None:
            os.pwrite(note, b"%-12d" % case, 0)
            if case % 64 == 0:
                faulthandler.dump_traceback_later(3 * MAX_SECONDS, exit=True)

        kinds = {name: kind for name, kind in readers().items() if name.startswith(only)}
        with limited_address_space(ADDRESS_SPACE):
            files = result.setdefault("files", _nothing(kinds, cases.start))
            if files["first"] != cases.start or files["read"].keys() != kinds.keys():
                raise SystemExit(f"{output} begins with another case, or is of other readers")
            for key, entry in list(files["failures"].items()):
                if not run(kinds, result["seed"], entry["cases"], folder, started).failures:
                    files["mended"][key] = files["failures"].pop(key)
            before = peak_bytes()
            while files["cases"] < len(cases) and time.monotonic() < until:
                start = time.perf_counter()
                part = cases[files["cases"] : files["cases"] + PART]
                in_time = takewhile(lambda _: time.monotonic() < until, part)
                found = run(kinds, result["seed"], in_time, folder, started)
                found.add_to(files)
                files["seconds"] = round(files["seconds"] + time.perf_counter() - start, 1)
                grown = round((peak_bytes() - before) / MiB, 1)
                files["peak_growth_mib"] = max(files["peak_growth_mib"], grown)
                write(result, output)
        faulthandler.cancel_dump_traceback_later()
        os.close(note)


def _nothing(kinds: dict[str, Reader], first: int) -> dict[str, Any]:
    none = dict.fromkeys(sorted(kinds), 0)
    return {"first": first, "cases": 0, "seconds": 0.0, "peak_growth_mib": 0.0, "read": none,
            "refused": none.copy(), "failures": {}, "mended": {}}  # fmt: skip


if __name__ == "__main__":
    main()
