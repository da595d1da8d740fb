"""Building, finding and loading the native library, and doing without it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from quantforge.errors import UnsupportedError
from quantforge.native import build as build_module
from quantforge.native import library as native
from quantforge.native.build import (
    FILE_NAME,
    LEVEL_FLAGS,
    SOURCE,
    BuildError,
    build,
    cache_folder,
    find_compiler,
    units,
)
from quantforge.native.check import self_check
from quantforge.native.code import byte_centroids
from quantforge.native.library import Library
from quantforge.numerics.codebook import codebook_of
from quantforge.ops import quantize, scores
from quantforge.spec import QuantSpec
from tests.helpers import assert_same_bits, gaussian, make_store

X86 = platform.machine().lower() in build_module.X86


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Forget the library and what was found out about it; look for it in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "SHIPPED", tmp_path)
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    native._load.cache_clear()
    find_compiler.cache_clear()


def _script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _assert_eager_serves() -> None:
    """Assert the same codes and close scores without the library, and a reason on request."""
    spec = QuantSpec(64, 4)
    store = make_store(spec, 50)
    x, query = torch.from_numpy(gaussian(50, 64)), torch.from_numpy(gaussian(3, 64, seed=5))
    assert_same_bits(*quantize(x, spec), store.encoded)
    got = scores(query, store.packed, store.scales, spec, precision="fast")
    np.testing.assert_allclose(got, gaussian(3, 64, seed=5) @ store.exact.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match=r'quantize with impl="native": .*use impl="auto"'):
        quantize(x, spec, impl="native")


def test_without_a_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING, "quantforge"):
        _assert_eager_serves()
        _assert_eager_serves()
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "no native CPU kernels, operators run in eager torch: "
        "there is no C++ compiler (c++, g++ or clang++) on the path"
    ]


def test_a_compiler_that_fails(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = 'test "$1" = --version && echo broken 1.0 && exit 0; echo no room left >&2; exit 1'
    monkeypatch.setenv("CXX", str(_script(fresh / "broken", text)))
    with caplog.at_level(logging.WARNING, "quantforge"):
        _assert_eager_serves()
        _assert_eager_serves()
    assert len(caplog.records) == 1, "said once"
    assert "no room left" in caplog.records[0].getMessage()
    assert not list(fresh.glob("cache/**/*.so"))


def test_a_cache_that_cannot_be_written(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    _compiler_or_skip()
    _assert_eager_serves()


def _compiler_or_skip() -> str:
    try:
        return find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def test_the_switch(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.library() == "the environment says QUANTFORGE_NATIVE=0"
    _assert_eager_serves()


def test_a_library_that_computes_wrongly_is_not_used(
    library: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong:
        byte_offset = library.byte_offset

        def call(self, name: str, *args: object) -> None:
            library.call(name, *args[:-1], 1)
            if name == "qf_scores":
                scores_out = args[6]._obj.data  # type: ignore[attr-defined]
                np.frombuffer((np.ctypeslib.ctypes.c_char * 4).from_address(scores_out), "f4")[
                    :
                ] = 9

    assert self_check(library) is None
    assert self_check(Wrong()).startswith("scores are wrong for dim=96;bits=3")  # type: ignore[union-attr]
    native._load.cache_clear()
    monkeypatch.setattr(native, "self_check", lambda found: "codes differ")
    with caplog.at_level(logging.WARNING, "quantforge"):
        assert native.library() == "codes differ"
        _assert_eager_serves()
    assert [r.getMessage() for r in caplog.records] == [
        "the native CPU kernels failed their self-check, not used: codes differ"
    ]
    native._load.cache_clear()


def test_a_library_of_other_sources_is_not_used(
    library: Library, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "source_hash", lambda: "0123")
    assert native._open(library.path) is None
    assert native._open(fresh / "missing.so") is None
    monkeypatch.setattr(native, "source_hash", lambda: library.source)
    found = native._open(library.path)
    assert found is not None
    assert found.source == library.source


def _copying_compiler(folder: Path, library: Path) -> Path:
    """Return a quick stand-in for a compiler: it "links" by copying a library slowly."""
    text = f"""
    case "$1" in --version) echo stub 1.0; exit 0;; esac
    for last; do :; done
    case "$1" in
        -shared) head -c 1000 {library} > "$last"; sleep 0.2; cat {library} > "$last";;
        *) : > "$last";;
    esac"""
    return _script(folder / "stub", text)


def _build_and_load(folder: Path, compiler: Path) -> str:
    os.environ["CXX"] = str(compiler)
    find_compiler.cache_clear()
    return Library(build(folder)).source


def test_processes_may_build_at_the_same_time(library: Library, tmp_path: Path) -> None:
    compiler = _copying_compiler(tmp_path, library.path)
    folder = tmp_path / "cache"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        sources = pool.starmap(_build_and_load, [(folder, compiler)] * 6)
    assert sources == [library.source] * 6
    assert [path.name for path in folder.iterdir()] == [FILE_NAME], "and nothing is left over"


def test_the_cache_is_keyed_by_compiler_and_source(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = set()
    for version in ("one", "two"):
        compiler = _script(fresh / version, f"echo {version}")
        monkeypatch.setenv("CXX", str(compiler))
        find_compiler.cache_clear()
        folders.add(cache_folder())
    copy = shutil.copytree(SOURCE, fresh / "source")
    (copy / "api.cpp").write_text("// changed")
    monkeypatch.setattr(build_module, "SOURCE", copy)
    folders.add(cache_folder())
    assert len(folders) == 3
    assert all(fresh in folder.parents for folder in folders)


def test_a_build_is_reused(library: Library, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(_copying_compiler(fresh, library.path)))
    first = native.library()
    assert isinstance(first, Library), first
    assert first.path == cache_folder() / FILE_NAME
    native._load.cache_clear()
    monkeypatch.setattr(native, "build", None)  # a second build would fail
    second = native.library()
    assert isinstance(second, Library), second


@pytest.mark.skipif(not X86, reason="levels of x86")
@pytest.mark.parametrize("level", LEVEL_FLAGS)
def test_every_level_compiles_without_warnings(level: str) -> None:
    flags = units("x86_64")[level]
    call = [_compiler_or_skip(), *build_module.FLAGS, *flags, "-Wall", "-Wextra", "-Werror"]
    # gcc 12 takes the undefined lanes in its own AVX-512 header for a mistake
    call += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    call += ["-fsyntax-only", str(SOURCE / f"{level}.cpp")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_levels_of_this_processor(library: Library) -> None:
    assert library.levels[0] == "portable"
    info = Path("/proc/cpuinfo")
    if X86 and info.exists():
        flags = set(info.read_text().split())
        needed = {
            "avx2": {"avx2", "fma", "f16c"},
            "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2"},
        }
        expected = [name for name, wanted in needed.items() if wanted <= flags]
        assert list(library.levels[1:]) == expected


def test_sources_are_small_files() -> None:
    everywhere = {"api", "pool", "queries", "search", "portable", "search_portable"}
    assert set(units("aarch64")) == everywhere
    for path in SOURCE.iterdir():
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, path
        assert max(map(len, lines)) <= 100, path


FORK = """
import os, torch
from quantforge import QuantSpec
from quantforge.ops import quantize
torch.set_num_threads(3)
x = torch.randn(20000, 64)
want = quantize(x, QuantSpec(64, 4))[0]
child = os.fork()
got = quantize(x, QuantSpec(64, 4))[0]  # in both: the threads of the pool stay with the parent
assert torch.equal(got, want)
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_after_a_fork(library: Library) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", FORK],
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize("bits", range(1, 9))
def test_byte_centroids(bits: int) -> None:
    exact = codebook_of(QuantSpec(128, bits)).centroids
    integers, unit = byte_centroids(exact)
    assert np.abs(integers).max() <= 127
    np.testing.assert_array_equal(integers, -integers[::-1])
    error = np.sqrt(np.square(integers * unit - exact).mean() / np.square(exact).mean())
    assert error < (5e-3 if bits <= 4 else 1e-2)
