"""Two stages find what one finds, and read less."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.vectordb import IndexConfig, QuantizedIndex
from quantforge.vectordb.codec import Codec, Coded
from quantforge.vectordb.two_stage import first_stages, plan, survivors
from tests.vectordb.data import recall, skewed

DIM, K = 64, 10
X, Q, SAMPLE = skewed(3000, DIM), skewed(60, DIM, 1), skewed(100, DIM, 2)


def parts_of(x: torch.Tensor = X, **settings: Any) -> tuple[Codec, Coded]:
    index = QuantizedIndex(DIM, IndexConfig(**settings))
    index.add(x)
    core = index._core
    assert core is not None
    return core.codec, core.rows.coded(slice(None))


def full_scores(codec: Codec, coded: Coded, query: torch.Tensor) -> torch.Tensor:
    return codec.scores(codec.queries(query), coded)


CODES = [
    {"mode": "adapted", "bits": 2},
    {"mode": "adapted", "bits": 4, "metric": "l2"},
    {"mode": "centred", "bits": 3},
    {"mode": "centred", "bits": 6, "metric": "cosine"},
]


@pytest.mark.parametrize("settings", CODES, ids=str)
def test_two_stages_find_what_one_finds_and_read_less(settings: dict[str, Any]) -> None:
    codec, coded = parts_of(**settings)
    chosen = plan(codec, coded, SAMPLE, full_scores(codec, coded, SAMPLE), K, 0.98)
    full = full_scores(codec, coded, Q)
    first = chosen.stage.scores(codec, Q, coded)
    sigma = chosen.stage.deviation(codec, Q)[:, None] * coded.scales[:, 0].float()
    found, count = [], 0
    for i in range(len(Q)):
        rows, values = survivors(first[i], sigma[i], chosen.z, K, lambda r, i=i: full[i, r])
        assert torch.equal(values, full[i, rows])
        assert (rows.diff() > 0).all()
        found.append(rows[values.topk(K).indices])
        count += len(rows)
    assert recall(torch.stack(found), full.topk(K).indices) > 0.97
    read = chosen.stage.nbytes / codec.row_bytes + count / full.numel()
    assert read < 0.95
    assert read == pytest.approx(chosen.share, abs=0.1)


@pytest.mark.parametrize("settings", CODES, ids=str)
def test_what_is_not_seen_has_the_deviation_that_is_said(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(5)
    x, q = (torch.randn(n, DIM, generator=generator) for n in (2000, 50))
    codec, coded = parts_of(x, **settings)
    full = full_scores(codec, coded, q)
    stages = first_stages(codec)
    assert [stage.nbytes for stage in stages] == sorted(stage.nbytes for stage in stages)
    for stage in stages:
        rest = full - stage.scores(codec, q, coded)
        sigma = stage.deviation(codec, q)[:, None] * coded.scales[:, 0].float()
        assert 0.8 < float((rest / sigma).square().mean().sqrt()) < 1.2
        read = [coded.packed[p.group][:, p.start : p.stop].nbytes for p in stage.pieces]
        assert sum(read) / len(x) + 4 == stage.nbytes < codec.row_bytes


def test_a_higher_recall_costs_more() -> None:
    codec, coded = parts_of(mode="adapted", bits=4)
    sample = SAMPLE, full_scores(codec, coded, SAMPLE)
    shares = [plan(codec, coded, *sample, K, r).share for r in (0.5, 0.9, 0.99)]
    assert shares == sorted(shares)


def test_at_least_k_rows_survive() -> None:
    first = torch.arange(50.0)
    rows, values = survivors(first, torch.ones(50), -100.0, 7, lambda rows: first[rows])
    assert len(rows) >= 7
    assert values.max() == 49


def test_codes_in_one_plane_have_no_first_stage() -> None:
    codec, coded = parts_of(mode="centred", bits=4)
    sample = SAMPLE, full_scores(codec, coded, SAMPLE)
    with pytest.raises(InputError, match="a code of 4 bits in one plane has no cheap part"):
        plan(codec, coded, *sample, K, 0.99)
    with pytest.raises(InputError, match="between 0 and 1"):
        plan(codec, coded, *sample, K, 1.0)
    with pytest.raises(InputError, match="at least k=4000"):
        plan(codec, coded, *sample, 4000, 0.9)


def test_the_upper_plane_is_the_sign() -> None:
    codec, coded = parts_of(mode="centred", bits=3)
    (stage,) = first_stages(codec)
    (piece,) = stage.pieces
    bits = np.unpackbits(coded.packed[0][:, piece.start :].numpy(), axis=1)
    assert 0.4 < bits[:, :DIM].mean() < 0.6
    assert piece.gain == pytest.approx(1)  # a centroid is the mean of its cell, fine or coarse
