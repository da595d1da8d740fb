"""`quantforge benchmark`: its figures are those of theory, and of a count by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantforge import InputError, QuantForgeConfig, QuantPipeline
from quantforge.measure import measure, theory
from tests.helpers import gaussian, spec_of

Run = Callable[..., str]
DISTORTION = {1: 0.363, 2: 0.1175, 3: 0.0345, 4: 0.0095}  # arXiv 2504.19874, after Theorem 1


@pytest.mark.parametrize("bits", DISTORTION)
def test_theory_is_the_papers_and_data_agree(bits: int) -> None:
    assert theory(spec_of(2048, bits, scale_rule="mse")) == pytest.approx(
        DISTORTION[bits], rel=0.01
    )
    x, none = torch.from_numpy(gaussian(2000, 256)), torch.empty(0, 256)
    for rule in ("mse", "norm", "unbiased"):
        found = measure(x, none, QuantForgeConfig(bits=bits, scale_rule=rule))
        assert found.mse == pytest.approx(found.theory, rel=0.02)
        assert found.mse > found.bound == 4.0**-bits
        assert found.recall is None


def test_figures_against_a_count_by_hand() -> None:
    x, queries = torch.from_numpy(gaussian(500, 48)), torch.from_numpy(gaussian(20, 48, seed=1))
    config = QuantForgeConfig(bits=2, shift=True)
    found = measure(x + 3, queries, config, k=7)
    q = QuantPipeline(48, config).compress(x + 3)
    decoded = q.dequantize().double()
    exact = (x + 3).double()
    assert found.mse == pytest.approx(
        float((exact - decoded).square().sum() / exact.square().sum())
    )
    cosine = torch.nn.functional.cosine_similarity(exact, decoded)
    assert found.cosine == pytest.approx(float(cosine.mean()))
    true = (queries.double() @ exact.T).topk(7).indices.tolist()
    got = (queries.double() @ decoded.T).topk(7).indices.tolist()
    hits = sum(len(set(a) & set(b)) for a, b in zip(true, got, strict=True))
    assert found.recall == pytest.approx(hits / 140, abs=0.011)  # one near tie may fall otherwise
    assert (found.bytes_per_vector, found.ratio) == (14, 192 / 14)
    assert found.encode_gb_s > 0 < found.decode_gb_s


def test_no_vectors_and_no_theory() -> None:
    with pytest.raises(InputError, match=r"\(0, 8\)"):
        measure(torch.empty(0, 8), torch.empty(0, 8), QuantForgeConfig())
    assert theory(spec_of(64, 3, estimator="prod")) is None


def test_a_table(folder: Path, run: Run) -> None:
    out = run("benchmark", "data.npy", "--bits", "4")
    head, names, row = out.splitlines()
    assert head == "400 vectors of dim 64, 200 queries, cpu"
    assert names.split()[:5] == ["bits", "bytes", "ratio", "MSE", "theory"]
    assert row.split()[:3] == ["4", "34", "7.53x"]
    assert 0.008 < float(row.split()[3]) < 0.011


def test_json_file_and_plot(folder: Path, run_json: Callable[..., Any]) -> None:
    data = run_json("benchmark", "data.npy", "--bits", "1", "4", "--rows", "300", "--queries", "30",
                    "-k", "5", "--output", "out.json", "--plot", "out.svg")  # fmt: skip
    assert data == json.loads(Path("out.json").read_text())
    assert (data["vectors"], data["queries"], data["k"]) == (270, 30, 5)
    assert [row["bits"] for row in data["results"]] == [1, 4]
    one, four = data["results"]
    assert 0 < one["recall"] < four["recall"] <= 1
    assert {"torch", "quantforge", "hardware", "threads", "device"} <= set(data)
    assert Path("out.svg").read_text().lstrip().startswith("<?xml")


def test_default_bits_and_no_queries(folder: Path, run_json: Callable[..., Any]) -> None:
    data = run_json("benchmark", "data.npy", "--queries", "0", "--rows", "50")
    assert [row["bits"] for row in data["results"]] == [1, 2, 3, 4, 6, 8]
    assert all(row["recall"] is None for row in data["results"])


def test_failures(folder: Path, fail: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("one.npy", np.ones((1, 4), np.float32))
    assert "at least 2 vectors; it has 1" in fail("benchmark", "one.npy")
    Path("p.svg").write_text("mine")
    assert "p.svg is there" in fail("benchmark", "data.npy", "--plot", "p.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'quantforge[plot]'" in fail("benchmark", "data.npy", "--plot", "q.svg")
    assert Path("p.svg").read_text() == "mine"
