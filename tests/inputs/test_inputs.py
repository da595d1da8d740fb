"""Files of vectors: every format gives the same numbers, in pieces; damage is named."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from pyarrow import feather, parquet

from quantforge import FormatError, InputError, QuantPipeline, UnsupportedError, save_file
from quantforge.arrays import as_tensor
from quantforge.inputs import list_arrays, open_vectors, sample
from quantforge.inputs import rows as rows_module
from tests.helpers import gaussian

X = gaussian(300, 16)
IDS = np.arange(300)


def lists(x: np.ndarray, *, fixed: bool) -> pa.Array:
    flat = pa.array(x.reshape(-1))
    if fixed:
        return pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    return pa.ListArray.from_arrays(np.arange(0, x.size + 1, x.shape[1], dtype=np.int32), flat)


def table(x: np.ndarray = X, *, fixed: bool = True) -> pa.Table:
    return pa.table({"id": IDS[: len(x)], "x": lists(x, fixed=fixed)})


def stream(path: Path, t: pa.Table) -> None:
    with pa.ipc.new_stream(str(path), t.schema) as writer:
        writer.write_table(t, max_chunksize=30)


def records(path: Path, x: np.ndarray, dtype: str) -> None:
    dims = np.full((len(x), 1), x.shape[1], "<i4").view(np.uint8)
    path.write_bytes(np.hstack([dims, x.astype(dtype).view(np.uint8)]).tobytes())


WRITERS: dict[str, Any] = {
    "c.npy": lambda p, x=X: np.save(p, x),
    "fortran.npy": lambda p, x=X: np.save(p, np.asfortranarray(x)),
    "big_endian.npy": lambda p, x=X: np.save(p, x.astype(">f4")),
    "stored.npz": lambda p, x=X: np.savez(p, ids=IDS[: len(x)], x=x),
    "deflated.npz": lambda p, x=X: np.savez_compressed(p, x=x, ids=IDS[: len(x)]),
    "fortran.npz": lambda p, x=X: np.savez_compressed(p, x=np.asfortranarray(x)),
    "x.safetensors": lambda p, x=X: safetensors.torch.save_file(
        {"x": torch.from_numpy(x), "ids": torch.from_numpy(IDS[: len(x)])}, p
    ),
    "ours.safetensors": lambda p, x=X: save_file({"x": torch.from_numpy(x)}, p),
    "fixed.parquet": lambda p, x=X: parquet.write_table(table(x), p, row_group_size=30),
    "lists.parquet": lambda p, x=X: parquet.write_table(
        table(x, fixed=False), p, row_group_size=30
    ),
    "file.arrow": lambda p, x=X: feather.write_feather(table(x), p, chunksize=30),
    "stream.arrow": lambda p, x=X: stream(p, table(x, fixed=False)),
    "x.fvecs": lambda p, x=X: records(p, x, "<f4"),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_NUMBERS", 64 * 16)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    array = open_vectors(tmp_path / name)
    assert tuple(array.shape) == X.shape
    assert array.ndim == 2
    pieces = [as_tensor(array[i : i + 37]).numpy() for i in range(0, 300, 37)]
    np.testing.assert_array_equal(np.concatenate(pieces), X)
    np.testing.assert_array_equal(as_tensor(array[5:9]), X[5:9])  # and from the start again
    np.testing.assert_array_equal(as_tensor(array[250:299]), X[250:299])
    np.testing.assert_array_equal(as_tensor(array[(123,)]), X[123])
    np.testing.assert_array_equal(as_tensor(array[:]), X)
    assert len(array[300:400]) == 0


def test_the_pipeline_takes_them(tmp_path: Path) -> None:
    pipeline = QuantPipeline(16)
    expected = pipeline.compress(X)
    for name in ("deflated.npz", "lists.parquet", "x.fvecs"):
        WRITERS[name](tmp_path / name)
        q = pipeline.compress(open_vectors(tmp_path / name))
        assert torch.equal(q, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes_stay_what_they_are(tmp_path: Path, dtype: Any) -> None:
    x = X.astype(dtype)
    np.savez_compressed(tmp_path / "x.npz", x=x)
    parquet.write_table(table(x), tmp_path / "x.parquet")
    safetensors.torch.save_file({"x": torch.from_numpy(x)}, tmp_path / "x.safetensors")
    for suffix in ("npz", "parquet", "safetensors"):
        array = open_vectors(tmp_path / f"x.{suffix}")
        assert str(array.dtype).removeprefix("torch.") == np.dtype(dtype).name
        np.testing.assert_array_equal(as_tensor(array[:]), x)


def test_bfloat16_and_small_integers(tmp_path: Path) -> None:
    bf16 = torch.from_numpy(X).bfloat16()
    safetensors.torch.save_file({"x": bf16}, tmp_path / "x.safetensors")
    assert torch.equal(open_vectors(tmp_path / "x.safetensors"), bf16)
    small = (X * 20).astype(np.int8)
    np.save(tmp_path / "x.npy", small)
    records(tmp_path / "x.bvecs", small.view(np.uint8), "u1")
    for name, expected in (("x.npy", small), ("x.bvecs", small.view(np.uint8))):
        array = open_vectors(tmp_path / name)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array[3:8], expected[3:8].astype(np.float32))


def test_stdin_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    np.save(buffer, X)
    buffer.seek(0)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=buffer))
    array = open_vectors("-")
    np.testing.assert_array_equal(array[:100], X[:100])
    np.testing.assert_array_equal(array[97], X[97])  # the last piece is still there
    np.testing.assert_array_equal(array[100:], X[100:])
    with pytest.raises(InputError, match="stdin can be read only once"):
        array[0:1]


def test_what_a_file_holds_is_listed_without_reading_it(tmp_path: Path) -> None:
    for name in ("stored.npz", "x.safetensors", "fixed.parquet", "stream.arrow"):
        WRITERS[name](tmp_path / name)
        entries = list_arrays(tmp_path / name)
        assert entries["x"].shape == (300, 16)
        assert [key for key, entry in entries.items() if entry.holds_vectors] == ["x"]
        assert len(entries) == 2
    codes = QuantPipeline(16).compress(X)
    save_file({"codes": codes, "x": torch.zeros(2, 2)}, tmp_path / "q.safetensors")
    entry = list_arrays(tmp_path / "q.safetensors")["codes"]
    assert entry.spec == codes.spec
    assert torch.equal(entry.open(), codes)


def test_the_array_is_named_where_there_are_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=X, b=X + 1, ids=IDS)
    np.testing.assert_array_equal(open_vectors(tmp_path / "x.npz", name="b")[:], X + 1)
    with pytest.raises(InputError, match=r"'a' float32 \(300, 16\), 'b' float32"):
        open_vectors(tmp_path / "x.npz")
    with pytest.raises(InputError, match="no array 'c'"):
        open_vectors(tmp_path / "x.npz", name="c")


def test_a_sample_is_even_and_no_greater(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.savez_compressed(tmp_path / "x.npz", x=X)
    for name in ("x.npy", "x.npz"):
        for rows, step in ((300, 1), (100, 3), (64, 5), (7, 43), (1000, 1)):
            found = sample(open_vectors(tmp_path / name), rows)
            np.testing.assert_array_equal(found, X[::step])
    np.testing.assert_array_equal(sample(X.reshape(30, 10, 16), 100), X[::3])


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("x.npy", b"no", FormatError, "not a readable .npy"),
        ("x.npz", b"no", FormatError, "not a readable .npz"),
        ("x.safetensors", b"no", FormatError, "not a readable safetensors"),
        ("x.parquet", b"no", FormatError, "cannot be read"),
        ("x.arrow", b"no", FormatError, "cannot be read"),
        ("x.fvecs", b"\x02\0\0\0" + bytes(9), FormatError, "not a .fvecs file"),
        ("x.fvecs", b"\xff\xff\xff\xff" + bytes(8), FormatError, "not a .fvecs file"),
        ("x.csv", b"1,2", InputError, ".npy, .npz"),
        ("x.fvecs", b"", FormatError, "not a .fvecs file"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        open_vectors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["deflated.npz", "stored.npz"])
def test_truncated_archives(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="not a readable"):
        open_vectors(tmp_path / name)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x55
    (tmp_path / "deflated.npz").write_bytes(flipped)
    if name == "deflated.npz":
        with pytest.raises(FormatError, match="damaged"):
            open_vectors(tmp_path / name)[:]


def test_truncated_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    np.save(buffer, X)
    cut = io.BytesIO(buffer.getvalue()[:-100])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=cut))
    with pytest.raises(FormatError, match="stdin ends after 298 of 300 rows"):
        open_vectors("-")[:]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"text")))
    with pytest.raises(FormatError, match=r"stdin is not in \.npy format"):
        open_vectors("-")


def test_lists_of_other_lengths_and_columns_of_other_types(tmp_path: Path) -> None:
    rows: list[Any] = [[1.0, 2.0], [1.0, 2.0], None, [1.0]]
    for found, message in ((rows, "row 2 has null"), (rows[:2] + rows[3:], "row 2 has 1 num")):
        column = pa.array(found, pa.list_(pa.float32()))
        parquet.write_table(pa.table({"x": column}), tmp_path / "x.parquet")
        with pytest.raises(InputError, match=message):
            open_vectors(tmp_path / "x.parquet")[:]
    parquet.write_table(pa.table({"n": [1, 2]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match=r"'n' int64 \(2,\)"):
        open_vectors(tmp_path / "y.parquet")
    with pytest.raises(InputError, match="does not hold vectors"):
        open_vectors(tmp_path / "y.parquet", name="n")


def test_a_record_of_another_dim_is_found(tmp_path: Path) -> None:
    records(tmp_path / "x.fvecs", X, "<f4")
    data = bytearray((tmp_path / "x.fvecs").read_bytes())
    data[100 * 68 : 100 * 68 + 4] = (17).to_bytes(4, "little")
    (tmp_path / "x.fvecs").write_bytes(data)
    array = open_vectors(tmp_path / "x.fvecs")
    assert len(array[:100]) == 100
    with pytest.raises(FormatError, match="dim 16 alone; one that begins with 17"):
        array[90:110]


def test_a_missing_package_or_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        open_vectors(tmp_path / "none.npy")
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'quantforge\[cli\]'"):
        open_vectors(tmp_path / "x.parquet")


def test_a_page_that_says_it_is_2_gib_takes_no_memory(tmp_path: Path) -> None:
    WRITERS["fixed.parquet"](tmp_path / "x.parquet")
    good = (tmp_path / "x.parquet").read_bytes()
    # of the last dictionary: kind 2, bytes, bytes in the file, which is the size that is read first
    header = list(
        re.finditer(rb"\x15\x04\x15[\x80-\xff]+.\x15([\x80-\xff]+.)\x4c", good, re.DOTALL)
    )
    at, end = header[-1].span(1)
    (tmp_path / "x.parquet").write_bytes(good[:at] + b"\xfe\xff\xff\xff\x0f" + good[end:])
    pool = pa.default_memory_pool()
    array = open_vectors(tmp_path / "x.parquet")
    with pytest.raises(FormatError, match=r"x\.parquet cannot be read: .*Page was smaller"):
        array[299:]
    assert pool.max_memory() < 2**30


def test_a_negative_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    WRITERS["fixed.parquet"](path, np.ascontiguousarray(X[:, :13]))
    said = parquet.read_metadata(path).metadata[b"ARROW:schema"]
    width, negative = (n.to_bytes(4, "little", signed=True) for n in (13, -13))
    schema = base64.b64decode(said)
    assert schema.count(width) == 1
    lie = base64.b64encode(schema.replace(width, negative))
    path.write_bytes(path.read_bytes().replace(said, lie))
    with pytest.raises(FormatError, match=r"'x' has the impossible shape \(300, -13\)"):
        open_vectors(path)


def test_an_array_of_a_dtype_that_torch_cannot_compute_with(tmp_path: Path) -> None:
    header = b'{"x": {"dtype": "F4", "shape": [8, 8], "data_offsets": [0, 32]}}'
    body = len(header).to_bytes(8, "little") + header + bytes(32)
    (tmp_path / "x.safetensors").write_bytes(body)
    with pytest.raises(InputError, match=r"'x' F4 \(8, 8\)"):
        open_vectors(tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="'x' has the unsupported dtype F4"):
        open_vectors(tmp_path / "x.safetensors", name="x")
