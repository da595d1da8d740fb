"""The benchmark of an index on a GPU, with few rows where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks import search_gpu
from benchmarks.record import read_rows


def test_small(tmp_path: Path) -> None:
    (row,) = read_rows(search_gpu.main(["--small", "--out", str(tmp_path)]))
    assert row["case"] == "synthetic 6000 x 64, 4 bits"
    found = row["found"]
    assert found["flat"]["nlist"] == 1
    assert found["lists"]["nlist"] == 32
    assert found["bf16"]["recall"] > 0.95
    assert found["flat"]["recall"] > 0.85
    assert found["lists"]["of full scan"] > search_gpu.TARGET - 0.03
    assert 0 < found["lists"]["nprobe"] < 32
    if torch.cuda.is_available():
        assert abs(found["lists"]["off"]) < 0.5  # few rows: workspaces count


def test_parts_are_the_whole() -> None:
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((300, 8)).astype(np.float32))
    query = x[:20] + 0.1
    rows = search_gpu.best_of(iter(x.split(70)), query)
    assert torch.equal(rows, (query @ x.T).topk(search_gpu.K).indices)
