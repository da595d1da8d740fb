"""Compiling the native library: by the wheel, or on first use.

Standard library only: the build hook of the wheel loads this file by its path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
SHIPPED = Path(__file__).parent / "lib"
"""Where the wheel has the library."""
FILE_NAME = "libquantforge.so"
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # codes are bit-identical only without fused multiply-add
    "-fno-math-errno",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
LEVEL_FLAGS = {"portable": (), "avx2": _AVX2, "avx512": (*_AVX2, *_AVX512)}
"""Levels, from the slowest, each a source file with flags of its own."""
SEARCH_FLAGS = ("-fno-tree-pre",)
"""GCC 12 copies the sums of search kernels from register to register without it: 10% slower."""
X86 = ("x86_64", "amd64")


class BuildError(Exception):
    """The library cannot be compiled here."""


def units(machine: str) -> dict[str, tuple[str, ...]]:
    """Return the source files for a machine and the flags of each."""
    levels = LEVEL_FLAGS if machine.lower() in X86 else {"portable": ()}
    search = {f"search_{level}": (*flags, *SEARCH_FLAGS) for level, flags in levels.items()}
    return {"api": (), "pool": (), "queries": (), "search": (), **levels, **search}


def source_hash() -> str:
    """Return a digest of the sources and flags: what the library is made of."""
    digest = hashlib.sha256(repr((FLAGS, LEVEL_FLAGS, SEARCH_FLAGS)).encode())
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@lru_cache
def find_compiler() -> str:
    """Return the C++ compiler: `$CXX`, or the first of c++, g++ and clang++ on the path.

    Raises:
        BuildError: if there is none, or the platform is not one the sources are written for.
    """
    if sys.platform not in ("linux", "darwin"):
        raise BuildError(f"the native library is not built on {sys.platform}")
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("there is no C++ compiler (c++, g++ or clang++) on the path")


@lru_cache
def compiler_version(compiler: str) -> str:
    """Return the first line of `<compiler> --version`."""
    return _run([compiler, "--version"]).splitlines()[0]


def cache_folder() -> Path:
    """Return the folder of this user for what is built here, by source and compiler."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    compiler = find_compiler()
    version = f"{compiler}\n{compiler_version(compiler)}\n{platform.machine()}"
    key = f"{source_hash()}-{hashlib.sha256(version.encode()).hexdigest()[:8]}"
    return root / "quantforge" / "native" / key


def build(folder: Path) -> Path:
    """Compile the library into a folder and return its path.

    It appears there complete or not at all, so processes may build at the same time.

    Raises:
        BuildError: with what the compiler said.
        OSError: if the folder cannot be written.
    """
    compiler = find_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as name:
        macro = f'-DQF_SOURCE="{source_hash()}"'
        objects, calls = [], []
        for unit, flags in units(platform.machine()).items():
            source, result = str(SOURCE / f"{unit}.cpp"), f"{name}/{unit}.o"
            objects.append(result)
            calls.append([compiler, *FLAGS, *flags, macro, "-c", source, "-o", result])
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, calls))
        library = Path(name) / FILE_NAME
        _run([compiler, "-shared", "-pthread", *objects, "-o", str(library)])
        target = folder / FILE_NAME
        library.replace(target)
    return target


def _run(call: list[str]) -> str:
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(call)} failed:\n{done.stderr[-4000:]}")
    return done.stdout
