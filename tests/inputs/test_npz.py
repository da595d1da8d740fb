"""Compressed vectors as .npz: numpy alone decodes them, and nothing damaged is read."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantforge import FormatError, InputError, QuantForgeConfig, QuantPipeline, load_file
from quantforge.io.npz import create_npz, load_npz
from quantforge.tensor import QuantTensor
from tests.helpers import gaussian
from tests.test_docs import ROOT, python_blocks

FORMAT = ROOT / "docs" / "format.md"


def written(path: Path, dim: int = 32, n: int = 50, **config: Any) -> np.ndarray:
    x = gaussian(n, dim) + 1
    QuantPipeline(dim, QuantForgeConfig(**config)).compress_file(x, path)
    return x


@pytest.mark.parametrize(
    ("dim", "config"),
    [
        (96, {"bits": 3, "shift": True, "equalizer": True}),
        (256, {"bits": 7, "seed": 5}),
        (160, {"bits": 1, "scale_dtype": "float32", "scale_rule": "mse"}),
        (50, {"bits": 6, "equalizer": True}),
        (12, {"bits": 5, "rotation": "qr", "codebook": "e4m3"}),
        (33, {"bits": 2, "rotation": "none", "codebook": (-1.5, -0.5, 0.75, 1.5)}),
    ],
)
def test_the_documented_lines_decode_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dim: int, config: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("compressed.npz"), dim, **config)
    written(Path("same.safetensors"), dim, **config)
    (block,) = python_blocks(FORMAT)
    assert "quantforge." not in block
    scope: dict[str, Any] = {}
    exec(compile(block, "format.md", "exec"), scope)
    q = load_npz("compressed.npz")
    assert torch.equal(q, load_file("same.safetensors")["vectors"])
    assert scope["x"].shape == (50, dim)
    np.testing.assert_allclose(scope["x"], q.dequantize().numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(0, 32), (32,), (2, 3, 32)])
def test_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    pipeline = QuantPipeline(32)
    pipeline.compress_file(x, tmp_path / "x.npz")
    q = load_npz(tmp_path / "x.npz")
    assert torch.equal(q, pipeline.compress(x))
    assert (q.container, q.shape) == ("numpy", shape)
    pipeline.decompress_file(tmp_path / "x.npz", tmp_path / "y.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), pipeline.decompress(q))


def test_equal_content_gives_equal_bytes_and_recompressed_members_are_read(tmp_path: Path) -> None:
    written(tmp_path / "a.npz")
    written(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    np.savez_compressed(tmp_path / "c.npz", **np.load(tmp_path / "a.npz"))
    assert torch.equal(load_npz(tmp_path / "c.npz"), load_npz(tmp_path / "a.npz"))


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    written(tmp_path / "x.npz")
    before = (tmp_path / "x.npz").read_bytes()
    x = gaussian(100_000, 32)
    x[99_000] = np.nan
    with pytest.raises(InputError, match=r"99000"):
        QuantPipeline(32).compress_file(x, tmp_path / "x.npz")
    template = QuantPipeline(32).compress(gaussian(10, 32))
    with (
        pytest.raises(InputError, match="4 of 10 rows"),
        create_npz(tmp_path / "x.npz", {"x": template}) as file,
    ):
        file.write("x", template[:4])
    assert (tmp_path / "x.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"write x\.safetensors"):
        written(tmp_path / "x.npz", estimator="prod")
    shifted = QuantTensor.quantize(torch.ones(2, 3, 32), shift=torch.ones(2, 1, 32))
    for templates in ({"x": shifted}, {"x": torch.ones(3)}, {}):
        with pytest.raises(InputError), create_npz(tmp_path / "x.npz", templates):
            pass
    assert not list(tmp_path.iterdir())


def damaged(path: Path, **changes: Any) -> None:
    arrays = dict(np.load(path)) | changes
    np.savez(path, **{key: a for key, a in arrays.items() if a is not None})


def header(path: Path, **changes: Any) -> np.ndarray:
    return np.array(json.dumps(json.loads(str(np.load(path)["quantforge"])) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": None}, "'vectors.packed' is missing"),
        ({"scales": np.ones((7, 1), np.float16)}, "scales"),
        ({"scales": np.ones((50, 1), ">f4")}, "dtype"),
        ({"packed": np.zeros((50, 4), np.uint8)}, "packed"),
        ({"shift": np.zeros(32, np.float32)}, "not listed"),
        ({"quantforge": None}, "not written by quantforge"),
        ({"quantforge": np.array("{")}, "not valid JSON"),
        ({"quantforge": np.array(1.5)}, "JSON object"),
        ({"version": "99"}, "99"),
        ({"spec": {}}, "spec"),
        ({"shape": [50, 33]}, "shape"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.npz"
    written(path)
    fields = {key: change[key] for key in ("version", "spec", "shape") if key in change}
    arrays = {"quantforge": header(path, **fields)} if fields else change
    damaged(path, **arrays)
    with pytest.raises(FormatError, match=message):
        load_npz(path)


def test_archives_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    written(path)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError):
            load_npz(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["packed.npy"] = members["packed.npy"].replace(b"(50, 16)", b"(99, 16)")
    members["scales.npy"] = members["scales.npy"].replace(b"(50, 1)", b"(99, 1)")
    members["quantforge.npy"] = array_bytes(header(path, shape=[99, 32]))
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        with pytest.raises(FormatError, match="truncated"):
            load_npz(path)


def array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(("offset", "value"), [(6, 255), (9, 8)])
def test_a_directory_of_a_later_version_or_with_a_bad_name(
    tmp_path: Path, offset: int, value: int
) -> None:
    written(tmp_path / "x.npz")
    data = bytearray((tmp_path / "x.npz").read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + offset] = value
    data[entry + 46] = 0xFF  # first letter of the name
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(FormatError, match=r"not a readable \.npz file"):
        load_npz(tmp_path / "x.npz")
