"""Vectors kept beside their codes, in memory and in a file."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path

import pytest
import torch

from quantforge.errors import FormatError, InputError
from quantforge.io import load_file
from quantforge.vectordb.originals import HEADER_BYTES, Kind, OriginalsFile, pack, unpack
from tests.vectordb.data import skewed

DIM = 40
X = skewed(100, DIM)
KINDS: tuple[Kind, ...] = ("float16", "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_kept_within_the_rounding_of_their_kind(kind: Kind) -> None:
    x = torch.cat([X, torch.zeros(1, DIM), 1e4 * X[:1], 1e-3 * X[:1]])
    rows = pack(x, kind)
    assert rows.nbytes == len(x) * (2 * DIM if kind == "float16" else DIM + 4)
    allowed = x.abs() * 2**-11 + 2**-25
    if kind == "int8":
        allowed = (x.abs().amax(1, keepdim=True) / 127 * 0.5001).expand_as(x)
    assert ((unpack(rows, DIM) - x).abs() <= allowed).all()
    assert unpack(rows[:0], DIM).shape == (0, DIM)


def test_numbers_beyond_fp16_are_refused() -> None:
    with pytest.raises(InputError, match=r"1e\+05 is beyond fp16"):
        pack(torch.full((1, DIM), 1e5), "float16")
    assert torch.allclose(unpack(pack(torch.full((1, DIM), 1e5), "int8"), DIM), torch.tensor(1e5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_grows_and_is_a_safetensors_file(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / "originals.safetensors"
    file = OriginalsFile.create(path, DIM, kind)
    reader = OriginalsFile(path)
    assert file.append(X[:30]).tolist() == list(range(30))
    assert file.append(X[:0]).tolist() == []
    assert copy.deepcopy(file).append(X[30:]).tolist() == list(range(30, 100))
    places = torch.tensor([99, 3, 50])
    expected = unpack(pack(X, kind), DIM)
    for view in (file, reader, OriginalsFile(path)):
        assert torch.equal(view.take(places), expected[places])
        assert view.take(places[:0]).shape == (0, DIM)
    assert torch.equal(unpack(load_file(path)["rows"], DIM), expected)
    assert file.append(X[:1]).tolist() == [100]
    with pytest.raises(InputError, match="exists"):
        OriginalsFile.create(path, DIM, kind)


def test_what_a_crash_left_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "originals"
    file = OriginalsFile.create(path, DIM, "float16")
    file.append(X[:10])
    with open(path, "ab") as half:
        half.write(b"x" * 1234)
    again = OriginalsFile(path)
    assert len(again) == 10
    again.append(X[10:12])
    assert torch.equal(again.take(torch.arange(12)), X[:12].half().float())
    assert path.stat().st_size == HEADER_BYTES + 12 * 2 * DIM


def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "originals"
    file = OriginalsFile.create(path, DIM, "int8")
    file.append(X[:10])
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            file.append(X)
    assert path.read_bytes() == before
    assert file.append(X).tolist() == list(range(10, 110))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "originals"
    OriginalsFile.create(path, DIM, "int8").append(X)
    data = path.read_bytes()
    for damaged, message in (
        (data[:-1], "is cut: it must have 5424 bytes; got 5423"),
        (b"", "is no file of originals"),
        (data[:200], "is no file of originals"),
        (data.replace(b'"shape":[100', b'"shape":[999'), "inconsistent header"),
        (
            data.replace(b'format\\": 1', b'format\\": 9'),
            "format 9",
        ),
    ):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=message):
            OriginalsFile(path)
    path.write_bytes(data)
    with pytest.raises(FormatError, match="holds 100 vectors, the index knows 101"):
        OriginalsFile(path).take(torch.tensor([100]))
