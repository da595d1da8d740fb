"""What is exported is read back by FAISS, pyarrow and numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantforge.vectordb import IndexConfig, QuantizedIndex
from tests.recipes.test_recipes import run


def test_export_vectors_small(tmp_path: Path) -> None:
    out = run("export_vectors.py", "--small", "--output", str(tmp_path))
    assert "2,000 vectors were written, read back and found" in out
    assert (tmp_path / "vectors.parquet").exists()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_export_vectors_of_a_saved_index(tmp_path: Path, metric: str) -> None:
    index = QuantizedIndex(32, IndexConfig(metric=metric, nlist=4))  # type: ignore[arg-type]
    index.add(np.random.RandomState(0).randn(400, 32).astype(np.float32))
    assert index.nlist == 4
    index.save(tmp_path / "index.safetensors")
    out = run("export_vectors.py", str(tmp_path / "index.safetensors"), "--output",
              str(tmp_path / "out"))  # fmt: skip
    assert "400 vectors" in out
    held = np.load(tmp_path / "out" / "vectors.npy")
    np.testing.assert_array_equal(held, index.reconstruct(index.ids))
