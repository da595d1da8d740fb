"""An index whose codes lie on another device finds what it finds on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantforge.vectordb import IndexConfig, QuantizedIndex
from tests.vectordb import elsewhere
from tests.vectordb.data import clustered

DIM, LISTS = 48, 16
X, Q = clustered(1500, DIM, 40), clustered(9, DIM, 40, 1)
KINDS: dict[str, dict[str, Any]] = {
    "oblivious": {"mode": "oblivious"},
    "centred": {"mode": "centred", "bits": 3, "metric": "l2"},
    "adapted": {"mode": "adapted", "bits": 2},
    "lists": {"nlist": LISTS, "bits": 2, "metric": "l2", "originals": "float16"},
    "late lists": {"nlist": LISTS, "mode": "oblivious", "metric": "cosine", "originals": "int8"},
}


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda":
        yield torch.device("cuda", 0)
        return
    with elsewhere.device() as found:
        yield found


def built(kind: str, device: torch.device | str = "cpu") -> QuantizedIndex:
    index = QuantizedIndex(DIM, IndexConfig(**{"nlist": 0, **KINDS[kind]})).to(device)
    index.add(X[:1200])
    index.add(X[1200:])  # in the tail, where there are lists
    return index


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if ours.dtype == np.float32:  # queries are projected by another library
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(ours, theirs)


SEARCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "all lists": {"nprobe": LISTS},
    "few ids": {"ids": np.arange(5, 60, 3)},
    "bitmap": {"bitmap": np.full(-(-len(X) // 8), 0b0101_0111, np.uint8)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_moved_index_finds_the_same(kind: str, device: torch.device) -> None:
    here = built(kind)
    there = here.copy().to(device)
    bitmap = SEARCHES["bitmap"]["bitmap"]
    bitmap[-1] &= (1 << (len(X) % 8 or 8)) - 1
    assert there.device == device
    assert there._known.rows["packed0"].device == device
    for name, options in SEARCHES.items():
        for queries in (Q, Q[:1]):
            expected = here.search(queries, 7, **options)
            assert_same(there.search(queries, 7, **options), expected), name
    if "originals" in KINDS[kind]:
        assert_same(there.search(Q, 7, rerank="auto"), here.search(Q, 7, rerank="auto"))
    border = float(here.search(Q, 7)[1][:, -1].mean())
    assert_same(there.range_search(Q, border), here.range_search(Q, border))
    ids = here.ids[::100]
    assert_same([there.reconstruct(ids)], [here.reconstruct(ids)])
    assert_same([there.standard_errors(Q, ids)], [here.standard_errors(Q, ids)])
    back = there.to("cpu")
    assert_same(back.search(Q, 7), here.search(Q, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_index_is_built_and_changed_there(kind: str, device: torch.device) -> None:
    here, there = built(kind), built(kind, device)
    for index in (here, there):
        index.remove_ids(np.arange(0, 1500, 7))
        index.update([1, 2, 3], X[500:503])
        index.add(X[:50] + 0.01)
    assert len(here) == len(there)
    assert there._known.rows["packed0"].device == device
    nprobe = there.nlist
    ours, theirs = (index.search(Q, 10, nprobe=nprobe)[0] for index in (there, here))
    same = (ours[:, :, None] == theirs[:, None]).any(1).mean()
    assert same > 0.95  # what is learned may differ in the last digit, and codes with it
    merged = QuantizedIndex(DIM, there.config).to(device)
    for part in there.shard(2):
        assert part.device == device
        merged.merge(part)
    assert_same(merged.search(Q, 10, nprobe=nprobe)[1:], there.search(Q, 10, nprobe=nprobe)[1:])


@pytest.mark.parametrize("kind", ["adapted", "lists"])
def test_files_are_those_of_the_cpu(kind: str, device: torch.device, tmp_path: Path) -> None:
    here = built(kind)
    here.save(tmp_path / "here.safetensors")
    here.copy().to(device).save(tmp_path / "there.safetensors")
    contents = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("here", "there")]
    assert contents[0] == contents[1]


def test_calibrate_and_rebuild(device: torch.device) -> None:
    index = built("lists", device)
    found = index.calibrate(0.9)
    assert found.recall >= 0.9
    truth, _ = index.search(Q, 3, nprobe=LISTS)
    assert index.calibrate(0.8, 3, Q, truth).recall >= 0.8
    index.rebuild()
    assert index.device == device
    assert index._known.rows["packed0"].device == device


def test_two_stages(device: torch.device) -> None:
    here = built("adapted")
    there = here.copy().to(device)
    ours, theirs = (index.search(Q, 7, two_stage=0.99)[0] for index in (there, here))
    assert (ours == theirs).mean() > 0.95


def test_report_counts_what_lies_there(device: torch.device) -> None:
    index = built("lists", device)
    moved = index.copy().to("cpu").to(device)
    assert index.memory_report() == moved.memory_report() or device.type == "cuda"
    assert moved.memory_report()["codes"] >= len(X) * moved._known.codec.row_bytes - 4 * len(X)


def test_unknown_device_is_refused() -> None:
    index = built("centred")
    with pytest.raises(RuntimeError):
        index.to("no such device")
    assert index.device == torch.device("cpu")
    index.search(Q, 3)
