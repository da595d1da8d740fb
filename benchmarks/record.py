"""Where and when something was measured, and the files that say so."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import quantforge

RESULTS = Path(__file__).parent / "results"


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """Return hardware, versions, commit and date of a measurement.

    `commit` says what git cannot: a copy of the working tree has no history.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": importlib.metadata.version("triton") if has_triton else None,
        "quantforge": quantforge.__version__,
        "commit": commit or _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = "AVX-512" if any("avx512f" in line for line in lines) else platform.machine()
    return f"{names[0] if names else platform.processor()}, {flags}"


def _commit() -> str:
    call = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def save(
    name: str,
    device: str,
    rows: list[dict[str, Any]],
    folder: Path = RESULTS,
    commit: str | None = None,
) -> Path:
    """Write rows and environment as JSON and return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path, where = folder / f"{name}.json", environment(device, commit)
    path.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    return path


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read what `save` wrote."""
    return json.loads((folder / f"{name}.json").read_text())


def slug(device: str) -> str:
    """Return a short name of the device for file names: "h200", "cpu"."""
    if device != "cuda":
        return device
    words = torch.cuda.get_device_name().lower().removeprefix("nvidia ").split()
    return re.sub(r"[^a-z0-9]+", "-", words[0]).strip("-")


def put_row(path: Path, row: dict[str, Any]) -> None:
    """Write a row into a file of JSON lines, in the place of an older row of the same case.

    Rows are written as they are measured: what a run that breaks off has measured is kept, and
    each row has the environment of its own run.
    """
    rows = {kept["case"]: kept for kept in read_rows(path)} if path.exists() else {}
    rows[row["case"]] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(kept) + "\n" for kept in rows.values()))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read what `put_row` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def median_ms(f: Callable[[], Any], device: str, repeats: int = 15) -> float:
    """Return the median time of a call in milliseconds, after two calls to warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for i in range(repeats + 2):
        wait()
        start = time.perf_counter()
        f()
        wait()
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
