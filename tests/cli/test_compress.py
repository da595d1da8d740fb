"""`quantforge compress`, `decompress` and `info`."""

from __future__ import annotations

import io
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from quantforge import QuantForgeConfig, QuantPipeline, load_file
from quantforge.arrays import CHUNK_NUMBERS
from quantforge.cli.main import main
from quantforge.io.npz import load_npz

Run = Callable[..., str]


@pytest.mark.parametrize("name", ["compressed.npz", "compressed.safetensors"])
def test_there_and_back(folder: Path, run: Run, x: np.ndarray, name: str) -> None:
    out = run("compress", "data.npy", "--bits", "4", "--output", name)
    assert name in out
    assert "(600, 64) in 4 bits" in out
    pipeline = QuantPipeline(64, QuantForgeConfig(bits=4))
    expected = pipeline.compress(x)
    stored = load_npz(name) if name.endswith("npz") else load_file(name)["vectors"]
    assert torch.equal(stored, expected)
    assert "restored.npy" in run("decompress", name, "--output", "restored.npy")
    np.testing.assert_array_equal(np.load("restored.npy"), pipeline.decompress(expected))


def test_settings_reach_the_code(folder: Path, run_json: Callable[..., Any]) -> None:
    data = run_json(
        "compress", "data.npy", "--bits", "3", "--rotation", "qr", "--codebook", "e4m3",
        "--scale-rule", "mse", "--scale-dtype", "float32", "--seed", "7", "--shift", "--equalizer",
        "--threads", "1",
    )  # fmt: skip
    assert data["output"] == "data.quantforge.safetensors"
    assert data["shape"] == [600, 64]
    assert data["ratio"] == pytest.approx(data["input_bytes"] / data["output_bytes"])
    assert data["output_bytes"] == Path(data["output"]).stat().st_size
    q = load_file(data["output"])["vectors"]
    spec = QuantForgeConfig(bits=3, rotation="qr", codebook="e4m3", scale_rule="mse",
                            scale_dtype="float32", seed=7).spec(64)  # fmt: skip
    assert q.spec == spec
    assert q.shift is not None
    assert q.equalizer is not None


def test_a_settings_file_and_what_wins_over_it(folder: Path, run: Run) -> None:
    QuantForgeConfig(bits=2, scale_rule="mse").save("settings.json")
    run("compress", "data.npy", "--config", "settings.json", "-o", "a.npz")
    run("compress", "data.npy", "--config", "settings.json", "--bits", "5", "-o", "b.npz")
    a, b = load_npz("a.npz").spec, load_npz("b.npz").spec
    assert (a.bits, a.scale_rule) == (2, "mse")
    assert (b.bits, b.scale_rule) == (5, "mse")


def test_files_are_replaced_only_by_force(folder: Path, run: Run, fail: Run) -> None:
    Path("out.npz").write_text("mine")
    assert "out.npz is there already; --force" in fail("compress", "data.npy", "-o", "out.npz")
    assert Path("out.npz").read_text() == "mine"
    run("compress", "data.npy", "-o", "out.npz", "--force")
    run("decompress", "out.npz")
    assert "out.restored.npy is there" in fail("decompress", "out.npz")
    run("decompress", "out.npz", "--force")


def test_stdin(folder: Path, run: Run, fail: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe() -> None:
        buffer = io.BytesIO(Path("data.npy").read_bytes())
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=buffer))

    pipe()
    assert "stdin.quantforge.safetensors" in run("compress", "-")
    run("compress", "data.npy", "-o", "file.safetensors")
    from_stdin = load_file("stdin.quantforge.safetensors")["vectors"]
    assert torch.equal(from_stdin, load_file("file.safetensors")["vectors"])
    np.save("data.npy", np.ones((20_000, 64), np.float32))  # more than one chunk
    pipe()
    assert "save it to a file first" in fail("compress", "-", "--shift", "-o", "x.npz")


def test_dtypes(folder: Path, run: Run, x: np.ndarray) -> None:
    safetensors.torch.save_file({"a": torch.from_numpy(x).bfloat16()}, "bf16.safetensors")
    run("compress", "bf16.safetensors", "-o", "bf16.npz")
    run("decompress", "bf16.npz", "-o", "a.npy")
    assert np.load("a.npy").dtype == np.float32
    run("decompress", "bf16.npz", "-o", "b.npy", "--dtype", "float16")
    assert np.load("b.npy").dtype == np.float16


def test_info(folder: Path, run: Run, run_json: Callable[..., Any]) -> None:
    run("compress", "data.npy", "--bits", "3", "-o", "c.npz")
    data = run_json("info", "c.npz")["arrays"]
    assert data[0]["shape"] == [600, 64]
    assert data[0]["nbytes"] == 600 * (24 + 2)
    assert data[0]["ratio"] == pytest.approx(256 / 26)
    assert data[0]["spec"]["bits"] == 3
    assert "3 bits, hadamard, lloyd_max, unbiased" in run("info", "c.npz")
    assert "(600, 64)" in run("info", "data.npy")
    np.savez("two.npz", a=np.zeros((2, 3), np.float32), b=np.arange(4))
    assert [array["name"] for array in run_json("info", "two.npz")["arrays"]] == ["a", "b"]


@pytest.mark.gpu
def test_a_gpu_gives_the_same_codes(folder: Path, run: Run) -> None:
    for name in ("data.npz", "data.safetensors"):
        run("compress", "data.npy", "-o", name, "--equalizer", "--device", "cuda")
    run("compress", "data.npy", "-o", "cpu.npz", "--equalizer")
    assert torch.equal(load_npz("data.npz"), load_npz("cpu.npz"))
    assert torch.equal(load_file("data.safetensors")["vectors"], load_npz("cpu.npz"))
    run("decompress", "data.npz", "-o", "gpu.npy", "--device", "cuda")
    run("decompress", "data.npz", "-o", "cpu.npy")
    np.testing.assert_allclose(np.load("gpu.npy"), np.load("cpu.npy"), rtol=0, atol=1e-5)
    found = [run("search", "data.npz", "queries.npy", "-k", "1", "--device", device).split()[2::4]
             for device in ("cpu", "cuda")]  # fmt: skip
    assert found[0] == found[1] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["compress", "none.npy"], "there is no file none.npy"),
        (["compress", "data.txt"], "files of vectors end in .npy"),
        (["compress", "data.npy", "--name", "y"], "no array 'y'"),
        (["compress", "nan.npy"], r"nan.npy|NaN"),
        (["compress", "data.npy", "--device", "cuda:99"], "there is no device 'cuda:99'"),
        (["compress", "data.npy", "--device", "tpu"], "there is no device 'tpu'"),
        (["compress", "data.npy", "--codebook", "e4m3", "--bits", "8"], "e4m3 codebook has 1-5"),
        (["compress", "data.npy", "--config", "none.json"], "none.json"),
        (["compress", "data.npy", "-o", "no/such/folder/x.npz"], "No such file or directory"),
        (["decompress", "data.npy", "-o", "y.npy"], "not a readable safetensors"),
        (["info", "none.npz"], "there is no file none.npz"),
    ],
)
def test_failures(folder: Path, fail: Run, x: np.ndarray, line: list[str], message: str) -> None:
    x[17, 3] = np.nan
    np.save("nan.npy", x)
    before = sorted(path.name for path in folder.iterdir())
    err = fail(*line)
    assert any(part in err for part in message.split("|"))
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "line",
    [
        ["compress"],
        ["compress", "data.npy", "--bits", "9"],
        ["compress", "data.npy", "--bits", "x"],
        ["compress", "data.npy", "-o", "out.zip"],
        ["compress", "data.npy", "--threads", "0"],
        ["decompress", "a.npz", "-o", "x.npz"],
        ["info"],
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], line: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    assert "usage: quantforge" in capsys.readouterr().err


@contextmanager
def limited(extra: int) -> Iterator[None]:
    """Let this process allocate so many bytes more than it has now."""
    status = Path("/proc/self/status").read_text()
    held = int(status.split("VmData:")[1].split()[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_memory_is_bounded(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data (128 MiB) exceed what may be allocated twice over."""
    monkeypatch.setitem(CHUNK_NUMBERS, "cpu", 1 << 17)
    shape = (262_144, 64)
    data = np.lib.format.open_memmap("big.npy", "w+", np.float64, shape)
    data[:, 0] = 1  # the rest is a hole in the file
    del data
    np.save("few.npy", np.ones((20, 64), np.float32))
    run("compress", "data.npy", "-o", "tables.npz")  # constants are made once
    with limited(64 << 20):
        run("compress", "big.npy", "-o", "big.npz", "--shift")
        run("decompress", "big.npz", "-o", "restored.npy")
        run("search", "big.npz", "few.npy", "-k", "1", "-o", "found.npz")
    restored = np.load("restored.npy", mmap_mode="r")
    assert restored.shape == shape
    assert np.allclose(restored[::10_000, 0], 1, atol=0.1)
    assert np.load("found.npz")["ids"].shape == (20, 1)
