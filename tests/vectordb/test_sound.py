"""Index files whose parts do not fit are refused by name: kernels would read past the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantforge import FormatError
from quantforge.vectordb import IndexConfig, QuantizedIndex
from tests.helpers import gaussian

Tensors = dict[str, torch.Tensor]
DIM, ROWS = 24, 60


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "good.safetensors"
    index = QuantizedIndex(DIM, IndexConfig(bits=3, nlist=4, originals="int8"))
    index.add(gaussian(ROWS - 2, DIM))
    index.add(gaussian(2, DIM, seed=1))
    index.save(path)
    return path


def _changed(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name].clone()).contiguous()

    return apply


def _put(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t[index] = value
        return t

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lists.starts", _put(-1, 2**31 - 1), "lists.starts must rise"),
        ("lists.starts", _put(1, 10**6), "lists.starts must rise"),
        ("lists.starts", _put(0, -1), "lists.starts must rise"),
        ("lists.starts", lambda t: t[:-1], "lists.starts must be"),
        ("lists.tail", lambda t: torch.full((2,), 9, dtype=torch.int32), "lists.(tail|starts)"),
        ("lists.centroids", lambda t: t[:, 1:], "lists.centroids must be"),
        ("lists.spreads", lambda t: t[1:], "lists.spreads must be"),
        ("lists.spreads", _put(0, float("nan")), "lists.spreads must be finite"),
        ("packed0", lambda t: t[1:], "packed0 must be"),
        ("packed0", lambda t: t[:, :-1], "packed0 must be"),
        ("scales", lambda t: t.float(), "scales must be torch.float16"),
        ("offsets", lambda t: t[:-1], "offsets must be"),
        ("ids", lambda t: t[:-1], "(packed0|ids|scales) (must be|has)"),
        ("originals", lambda t: t[:, :-1], "originals must be"),
        ("basis", lambda t: t[:-1], "basis must have shape"),
        ("mean", _put(0, float("nan")), "mean must be finite"),
        ("bits", _put(0, 9), "bits must fall"),
        ("bits", _put(0, -1), "bits must fall"),
        ("drift_counts", _put(2, 2**62), "drift_counts must be two counts, at most 64 looks"),
        ("drift_counts", _put(0, -1), "drift_counts must be"),
        ("drift_counts", lambda t: t[:3], "drift_counts must be"),
        ("drift_counts", lambda t: t.double(), "drift_counts must be"),
        ("drift_learned", lambda t: t[:, :-1], "moments of drift must have shape"),
    ],
)
def test_refused(
    tmp_path: Path,
    good: Path,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
) -> None:
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    _changed(name, change)(tensors)
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad, metadata)
    with pytest.raises(FormatError, match=f"bad.safetensors: the index is damaged: {message}"):
        QuantizedIndex.load(bad)


def test_the_good_one_loads(good: Path) -> None:
    index = QuantizedIndex.load(good)
    assert len(index) == ROWS
    assert index.search(gaussian(1, DIM), 3)[0].shape == (1, 3)
