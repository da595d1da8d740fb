"""Bulk compression: the same bytes for any number of workers, and nothing done twice or lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantforge import QuantForgeConfig, QuantPipeline
from quantforge.encode import encode_batch, encode_folder, folder, progress
from quantforge.encode.__main__ import main, worker_of
from quantforge.errors import InputError

FILES = ("a.npy", "b.safetensors", "c.parquet", "d.npy", "deep/a.npy", "deep/[x].npy", "empty.npy")
DIM = 64


@pytest.fixture
def source(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.RandomState(0)
    path = tmp_path / "in"
    (path / "deep").mkdir(parents=True)
    for i, file in enumerate(FILES):
        x = rng.randn(0 if file == "empty.npy" else 20 + i, DIM).astype(np.float32)
        if file.endswith(".npy"):
            np.save(path / file, x)
        elif file.endswith(".safetensors"):
            save_file({"x": x}, path / file)
        else:
            flat = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), DIM)
            pq.write_table(pa.table({"x": flat}), path / file)
    return path


def outputs(path: Path) -> dict[str, bytes]:
    found = (p for p in path.rglob("*") if p.is_file() and folder.RECORDS not in p.parts)
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in found}


@pytest.mark.parametrize("world", [2, 3, 9])
def test_any_number_of_workers_write_the_same_bytes(source: Path, world: int) -> None:
    for rank in reversed(range(world)):
        assert encode_folder(source, source.parent / "many", rank=rank, world=world) == {}
    assert encode_folder(source, source.parent / "one") == {}
    one = outputs(source.parent / "one")
    assert set(one) == {f"{file}.safetensors" for file in FILES}
    assert outputs(source.parent / "many") == one
    QuantPipeline(DIM).compress_file(source / "a.npy", source.parent / "alone.safetensors")
    assert one["a.npy.safetensors"] == (source.parent / "alone.safetensors").read_bytes()


def test_what_is_done_stays_and_what_changed_is_done_again(source: Path) -> None:
    out = source.parent / "out"
    encode_folder(source, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    np.save(source / "d.npy", np.ones((5, DIM), np.float32))
    assert progress(source, out).done == len(FILES) - 1
    encode_folder(source, out)
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert {p.name for p in before if after[p] != before[p]} == {"d.npy.safetensors"}


def test_a_killed_worker_is_resumed(source: Path) -> None:
    """It ends between writing a file and its record, and in the middle of the next."""
    out = source.parent / "out"
    killed = (
        "import os, pathlib, sys; from quantforge.encode import folder\n"
        "write, count = folder._write_json, []\n"
        "def dying(path, value):\n"
        "    count.append(path)\n"
        "    if len(count) == 4:\n"
        "        target = pathlib.Path(sys.argv[2], '.d.npy.safetensors.0.tmp')\n"
        "        target.write_bytes(b'half')\n"
        "        os._exit(9)\n"
        "    write(path, value)\n"
        "folder._write_json = dying\n"
        "folder.encode_folder(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", killed, source, out], check=False, timeout=120)
    assert done.returncode == 9
    assert progress(source, out).done == 2
    first = (out / "a.npy.safetensors").stat().st_mtime_ns
    assert encode_folder(source, out) == {}
    assert (out / "a.npy.safetensors").stat().st_mtime_ns == first
    assert encode_folder(source, source.parent / "whole") == {}
    assert outputs(out) == outputs(source.parent / "whole")


def test_a_bad_file_is_named_and_the_rest_is_done(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = source.parent / "out"
    (source / "b.npy").write_bytes(b"no vectors")
    np.save(source / "nan.npy", np.full((3, DIM), np.nan, np.float32))
    assert main([str(source), str(out)]) == 1
    assert f"{len(FILES)} of {len(FILES) + 2} files done, 2 failed" in capsys.readouterr().out
    assert set(progress(source, out).failed) == {"b.npy", "nan.npy"}
    assert main([str(source), str(out), "--status"]) == 1
    assert "nan.npy: " in capsys.readouterr().out
    for file in ("b.npy", "nan.npy"):
        np.save(source / file, np.ones((3, DIM), np.float32))
    assert main([str(source), str(out)]) == 0


def test_other_settings_are_refused(source: Path) -> None:
    out = source.parent / "out"
    encode_folder(source, out, QuantForgeConfig(bits=2))
    before = outputs(out)
    with pytest.raises(InputError, match="begun with"):
        encode_folder(source, out, QuantForgeConfig(bits=3))
    with pytest.raises(InputError, match="cannot go into"):
        encode_folder(source, source)
    with pytest.raises(InputError, match="rank"):
        encode_folder(source, out, rank=2, world=2)
    with pytest.raises(InputError, match="no files of vectors"):
        encode_folder(out / folder.RECORDS, source.parent / "none")
    assert outputs(out) == before


def test_torchrun(source: Path) -> None:
    """A worker that fails waits for the others, which torchrun would end."""
    (source / "a.npy").write_bytes(b"no vectors")
    out = source.parent / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "quantforge.encode", str(source), str(out), "--threads", "1"],
        check=False, timeout=200, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "a.npy" in done.stderr
    assert set(outputs(out)) == {f"{file}.safetensors" for file in FILES[1:]}


def test_worker_of() -> None:
    assert worker_of({}) == (0, 1, 0)
    assert worker_of({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == (3, 8, 1)
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2"}
    assert worker_of(slurm) == (5, 6, 2)


def test_batches_have_the_codes_of_files(source: Path) -> None:
    encode_folder(source, source.parent / "out")
    held = load_file(source.parent / "out" / "a.npy.safetensors")
    x = np.load(source / "a.npy")
    batch = encode_batch({"id": np.arange(len(x)), "x": x}, "x")
    lists = encode_batch({"id": range(len(x)), "x": [row.tolist() for row in x]}, "x")
    assert set(batch) == {"id", "x.packed", "x.scales"}
    for part in ("packed", "scales"):
        np.testing.assert_array_equal(batch[f"x.{part}"], held[f"vectors.{part}"])
        np.testing.assert_array_equal(lists[f"x.{part}"], held[f"vectors.{part}"])
    with pytest.raises(InputError, match="no column"):
        encode_batch({"y": x}, "x")
    with pytest.raises(InputError, match="batches would get different ones"):
        encode_batch({"x": x}, "x", QuantForgeConfig(shift=True))
