from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch

from quantforge import QuantTensor, load_file

RECIPE = Path(__file__).parents[2] / "recipes" / "compress_embeddings.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compress_embeddings", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(("bits", "recall"), [(1, 0.5), (4, 0.9), (8, 0.98)])
def test_small(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int, recall: float
) -> None:
    target = tmp_path / "out.safetensors"
    recipe.main(["--small", "--device", "cpu", "--bits", str(bits), "--output", str(target)])
    row = rows_of(capsys.readouterr().out)["docstrings"]
    assert float(row[-1]) > recall
    assert isinstance(load_file(target)["docstrings"], QuantTensor)


def test_every_input_format(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.random.RandomState(0).standard_normal((100, 2, 64)).astype(np.float32)
    ids = np.arange(100)
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "b.npz", x=x, ids=ids)
    tensors = {"x": torch.from_numpy(x).bfloat16(), "ids": torch.from_numpy(ids)}
    safetensors.torch.save_file(tensors, tmp_path / "c.safetensors")
    for name, expected in (("a.npy", {"a"}), ("b.npz", {"x"}), ("c.safetensors", {"x"})):
        recipe.main([str(tmp_path / name), "--device", "cpu"])
        assert rows_of(capsys.readouterr().out).keys() == expected
        loaded = load_file((tmp_path / name).with_suffix(".quantforge.safetensors"))
        assert {n for n, t in loaded.items() if isinstance(t, QuantTensor)} == expected
        if "ids" in loaded:
            assert torch.equal(loaded["ids"], torch.from_numpy(ids))


@pytest.mark.parametrize("argv", [[], ["x.npy", "--small"], ["--small", "--bits", "9"]])
def test_wrong_arguments(
    recipe: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        recipe.main(argv)
    assert "error" in capsys.readouterr().err
