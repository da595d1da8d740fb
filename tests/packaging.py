"""Wheel and source archive are built, and installed into empty environments with each extra.

    python -m tests.packaging [--extras none cli ...] [--audit] [--output FILE.json]

Each environment is new, has what pip finds for `quantforge[extra]`, and runs one command that needs
the extra, outside of the checkout. The wheel is made of the source archive.
The extra `vllm` is several gigabytes: uv tells which packages it would install, `make test-vllm`
runs it. `--audit` asks pip-audit about each environment; a finding, or a package of which the
service knows nothing, ends the run with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = "import numpy as np; np.save('x.npy', np.random.randn(400, 32).astype('f4'))"
PARQUET = (
    "import numpy as np, pyarrow as pa, pyarrow.parquet as pq; x = np.load('x.npy');"
    "pq.write_table(pa.table({'x': list(x)}), 'x.parquet')"
)
COMMANDS: dict[str, list[list[str]]] = {
    "none": [
        ["quantforge", "compress", "x.npy", "--bits", "4", "--output", "x.npz"],
        ["quantforge", "demo", "--only", "search", "--small", "--output", "out"],
    ],
    "cli": [
        ["python", "-c", PARQUET],
        ["quantforge", "compress", "x.parquet", "--output", "x.safetensors"],
    ],
    "optimize": [["quantforge", "optimize", "x.npy", "--policy", "tpe", "--trials", "4"]],
    "plot": [["quantforge", "benchmark", "x.npy", "--bits", "4", "--plot", "x.svg"]],
    "server": [],  # is served
    "docs": [["mkdocs", "--version"]],
    "dev": [["pytest", "--version"]],
}
RESOLVED = "vllm"
"""The extra that is not installed."""

MEMBERS = (
    "quantforge/native/lib/libquantforge.so",
    "quantforge/recipes/demo_cache.py",
    "quantforge/recipes/demo_search.py",
    "quantforge/recipes/assets/tiny-lm/config.json",
    "quantforge/py.typed",
)


def build(folder: Path) -> tuple[Path, Path]:
    """Build the source archive and, of it, the wheel; return both."""
    tools = folder / "build-tools"
    python = new_environment(tools, "build")
    checked([python, "-m", "build", "--outdir", folder, ROOT], cwd=folder)
    (archive,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return archive, wheel


def new_environment(folder: Path, *requirements: str) -> Path:
    """Make an empty environment with these packages; return its Python."""
    checked([sys.executable, "-m", "venv", folder], cwd=folder.parent)
    python = folder / "bin" / "python"
    checked([python, "-m", "pip", "install", "--quiet", *requirements], cwd=folder.parent)
    return python


def checked(call: list[Any], cwd: Path, **variables: str) -> str:
    """Run a command and return its output; `SystemExit` with it if it fails."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in call], cwd=cwd, text=True, check=False, env=env | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, call))}\n{done.stdout}")
    return done.stdout


def check_members(archive: Path, wheel: Path) -> int:
    """Check what the wheel has and has not; return the number of its files."""
    names = zipfile.ZipFile(wheel).namelist()
    with tarfile.open(archive) as tar:
        inside = [name.partition("/")[2] for name in tar.getnames()]
    sources = {name.removeprefix("src/") for name in inside if name.startswith("src/")}
    missing = [name for name in (*MEMBERS, *sorted(sources)) if name not in names]
    strangers = [name for name in names if name.startswith(("tests/", "benchmarks/", "recipes/"))]
    if missing or strangers or "tests/conftest.py" not in inside:
        raise SystemExit(f"{wheel.name} lacks {missing} and has {strangers}")
    return len(names)


def try_extra(extra: str, wheel: Path, folder: Path, audit: bool) -> dict[str, Any]:
    """Install the wheel with an extra and run what needs it."""
    start, place = time.perf_counter(), folder / extra
    place.mkdir()
    wanted = str(wheel) if extra == "none" else f"{wheel}[{extra}]"
    # torch first and alone: an unpinned torch may pull gigabytes of CUDA
    python = new_environment(place / "venv", "--constraint", str(ROOT / "constraints.txt"), "torch")
    checked([python, "-m", "pip", "install", "--quiet", wanted], cwd=place)
    checked([python, "-m", "pip", "check"], cwd=place)
    tools = python.parent
    where = checked([python, "-c", "import quantforge; print(quantforge.__file__)"], cwd=place)
    assert str(place) in where, f"imported from {where}"
    checked([tools / "quantforge", "--help"], cwd=place)
    checked([python, "-c", DATA], cwd=place)
    for name, *arguments in COMMANDS[extra]:
        checked([tools / name, *arguments], cwd=place)
    if extra == "server":
        _serve(tools / "quantforge", place)
    freeze = checked([python, "-m", "pip", "freeze", "--exclude", "quantforge"], cwd=place)
    row: dict[str, Any] = {"extra": extra, "packages": freeze.splitlines()}
    if audit:
        row["audit"] = _audit(freeze, folder)
    return row | {"seconds": round(time.perf_counter() - start)}


def resolve(extra: str, wheel: Path, folder: Path) -> dict[str, Any]:
    """Find the packages that the wheel with an extra would install, from their metadata alone."""
    start, tools = time.perf_counter(), folder / "resolver"
    python = new_environment(tools, "uv")
    said = checked(
        [tools / "bin" / "uv", "pip", "install", "--dry-run", "--python", python,
         f"quantforge[{extra}] @ {wheel.as_uri()}"],
        cwd=folder,
    )  # fmt: skip
    packages = re.findall(r"^ \+ (\S+)", said, re.MULTILINE)
    assert any(package.startswith(f"{extra}==") for package in packages), said
    return {"extra": extra, "resolved": packages, "seconds": round(time.perf_counter() - start)}


def _serve(command: Path, place: Path) -> None:
    with subprocess.Popen(
        [str(command), "serve", "--port", "0"], cwd=place, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            seen = []
            for line in server.stdout:
                seen.append(line)
                if "http://127.0.0.1:" in line:
                    break
            else:
                raise SystemExit("".join(seen))
            port = line.partition("http://127.0.0.1:")[2].split("/")[0].split()[0].strip('",.')
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=20) as answer:
                assert answer.status == 200
        finally:
            server.terminate()


def _audit(freeze: str, folder: Path) -> dict[str, Any]:
    """Return pip-audit's findings about pinned packages, and its version."""
    tools = folder / "audit-tools"
    python = tools / "bin" / "python"
    if not tools.exists():
        new_environment(tools, "pip-audit")
    pinned = [line for line in freeze.splitlines() if "==" in line and "+cpu" not in line]
    pinned += [line.partition("+cpu")[0] for line in freeze.splitlines() if "+cpu" in line]
    listing = folder / "requirements.txt"
    listing.write_text("\n".join(pinned) + "\n")
    done = subprocess.run(
        [python, "-m", "pip_audit", "--no-deps", "--disable-pip", "-r", listing, "-f", "json",
         "--progress-spinner", "off"],
        cwd=folder, text=True, check=False, capture_output=True,
    )  # fmt: skip
    version = checked([python, "-m", "pip_audit", "--version"], cwd=folder).strip()
    if done.returncode > 1 or not done.stdout:
        return {"tool": version, "failed": done.stderr.strip().splitlines()[-1:]}
    found = json.loads(done.stdout)["dependencies"]
    skipped = [
        d["name"] for d in found if "skip_reason" in d
    ]  # no answer about them is no good one
    return {
        "tool": version,
        "audited": len(found) - len(skipped),
        "skipped": skipped,
        "findings": {d["name"]: [v["id"] for v in d["vulns"]] for d in found if d.get("vulns")},
    }


def _unsafe(row: dict[str, Any]) -> str | None:
    """Return what an audit leaves open."""
    audit = row.get("audit", {})
    if audit.get("failed") or audit.get("findings"):
        return f"{row['extra']}: {audit}"
    if audit.get("skipped"):
        return f"{row['extra']}: nothing is known of {len(audit['skipped'])} packages"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*COMMANDS, RESOLVED]
    parser.add_argument("--extras", nargs="+", choices=every, default=every)
    parser.add_argument("--audit", action="store_true", help="ask pip-audit as well")
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        archive, wheel = build(folder)
        result: dict[str, Any] = {
            "archive": archive.name,
            "wheel": wheel.name,
            "wheel_files": check_members(archive, wheel),
            "wheel_mib": round(wheel.stat().st_size / 2**20, 2),
            "python": sys.version.split()[0],
            "date": time.strftime("%Y-%m-%d"),
            "extras": [],
        }
        print(json.dumps(result), flush=True)
        for extra in args.extras:
            if extra == RESOLVED:
                row = resolve(extra, wheel, folder)
            else:
                row = try_extra(extra, wheel, folder, args.audit)
            result["extras"].append(row)
            count = len(row.get("packages", row.get("resolved", ())))
            print(extra, count, "packages", row.get("audit", ""), row["seconds"], "s", flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if unsafe := [said for row in result["extras"] if (said := _unsafe(row))]:
        raise SystemExit("\n".join(["the audit is open:", *unsafe]))


if __name__ == "__main__":
    main()
