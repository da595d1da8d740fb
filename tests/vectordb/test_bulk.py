"""Indexes filled from streams, and the memory that they hold."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from quantforge.errors import FormatError, InputError
from quantforge.vectordb import IndexConfig, QuantizedIndex, stream
from quantforge.vectordb.moments import Passing
from tests.vectordb.data import clustered, recall, skewed

DIM = 32
X, Q = clustered(3000, DIM, 60), clustered(40, DIM, 60, 1)
CONFIG = IndexConfig(nlist=16, bits=3)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut streams into batches of 100 rows, of which 1000 are learned from."""
    monkeypatch.setattr(stream, "BATCH_BYTES", 100 * 4 * DIM)
    monkeypatch.setattr(stream, "SAMPLE_BYTES", 1000 * 4 * DIM)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("kind", ["path", "array", "tensor", "batches"])
def test_streams(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, X.numpy())
    source = {"path": path, "array": np.load(path, mmap_mode="r"), "tensor": X}.get(kind)
    index = QuantizedIndex(DIM, CONFIG)
    assert index.add_from(X.split(70) if source is None else source) == 3000
    assert (index.nlist, len(index)) == (16, 3000)
    assert sorted(index.ids) == list(range(3000))
    truth = (Q @ X.T).topk(10).indices
    whole = QuantizedIndex(DIM, CONFIG)
    whole.add(X)
    found = [torch.from_numpy(i.search(Q, 10, nprobe=16)[0]) for i in (index, whole)]
    assert recall(found[0], truth) > recall(found[1], truth) - 0.05
    assert index.add_from(X[:50], ids=np.arange(5000, 5050)) == 50
    assert index.add_from(iter([])) == 0
    assert index.add_from(np.empty((0, DIM), np.float32)) == 0


@pytest.mark.usefixtures("small_batches")
def test_a_stream_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    def breaking() -> Iterator[torch.Tensor]:
        yield X[:1500]
        yield X[:5] * torch.nan

    index = QuantizedIndex(DIM, CONFIG)
    with pytest.raises(InputError, match="NaN"):
        index.add_from(breaking())
    assert not index.is_trained
    index.add(X[:1200])
    before = index.search(Q, 5)
    with pytest.raises(InputError, match="NaN"):
        index.add_from(breaking())
    with pytest.raises(InputError, match="id 3 is in the index"):
        index.add_from(X[:300], ids=[*range(5000, 5299), 3])
    assert (len(index), int(index.add(X[:1])[0])) == (1200, 1200)
    index.remove_ids([1200])
    for was, now in zip(before, index.search(Q, 5), strict=True):
        np.testing.assert_array_equal(was, now)
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(FormatError, match=r"text\.npy"):
        index.add_from(tmp_path / "text.npy")


def test_a_sample_does_not_depend_on_batches() -> None:
    x = skewed(900, 8)
    samples = [Passing(8, 100, 5).see(x.split(n)).sample for n in (900, 64, 7)]
    assert all(torch.equal(samples[0], other) for other in samples)
    rows = {tuple(row) for row in x.tolist()}
    assert len({tuple(row) for row in samples[0].tolist()} & rows) == 100
    assert torch.equal(Passing(8, 1000).see([x]).sample, x)


RSS = """
import sys, gc, torch, ctypes
torch.set_num_threads(1)
from quantforge.vectordb import IndexConfig, QuantizedIndex, intake
def rss():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def fill(index, batches):
    parts, core = intake.prepare(index, torch.randn(4_000, 256), None)
    index._core = core
    for i in range(batches):
        core.append({**parts, "ids": parts["ids"] + 4_000 * i})
config = IndexConfig(bits=1, mode="centred", nlist=16, originals="float16")
warm = QuantizedIndex(256, config)
fill(warm, 2)
del warm
before = rss()
index = QuantizedIndex(256, config)
fill(index, 30)
print(rss() - before, index.memory_report()["total"])
"""


def test_memory_is_what_the_process_holds() -> None:
    held, said = map(int, subprocess.check_output([sys.executable, "-c", RSS], text=True).split())
    assert said > 60e6
    assert held == pytest.approx(said, rel=0.02)
