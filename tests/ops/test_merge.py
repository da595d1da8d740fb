"""Dense attention with log-sum-exp, the merge of segments, and measured statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.numerics import statistics
from quantforge.ops import merge
from quantforge.ops.attention.reference import attention as reference
from quantforge.ops.measure import measure
from tests.helpers import gaussian, to_float64

B, HQ, HKV, Q, N, D = 2, 4, 2, 3, 21, 16
MASKS = {
    "none": None,
    "padding": np.arange(N) > np.array([0, 5])[:, None, None, None],
    "per query": np.random.RandomState(1).rand(1, 1, Q, N) > 0.3,
    "per head": np.random.RandomState(2).rand(B, HQ, Q, N) > 0.3,
    "additive": np.random.RandomState(3).randn(1, 1, Q, N).astype(np.float32),
    "one query blind": np.arange(Q)[:, None] * np.ones((1, 1, 1, N)) != 1,
}


def operands(n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return gaussian(B, HQ, Q, D), gaussian(B, HKV, n, D, seed=1), gaussian(B, HKV, n, D, seed=2)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("unfused", [False, True])
def test_dense_attention(
    name: str, unfused: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if unfused:  # what runs on a GPU, a few query rows at a time
        monkeypatch.setattr(merge, "_flash_cpu", merge._matmul_softmax)
        monkeypatch.setattr(merge, "MAX_LOGITS", 5 * B * HKV * N)
    q, k, v = operands()
    mask = MASKS[name]
    out, lse = merge.dense_attention(
        *(torch.from_numpy(t).to(device) for t in (q, k, v)),
        None if mask is None else torch.from_numpy(mask).to(device),
        D**-0.5,
    )
    exact, exact_lse = reference(*(t.astype(np.float64) for t in (q, k, v)), mask, False, D**-0.5)
    np.testing.assert_allclose(to_float64(lse), exact_lse, rtol=1e-5, atol=1e-5)
    seen = np.isfinite(exact_lse)
    np.testing.assert_allclose(to_float64(out)[seen], exact[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_segments_merge_to_the_whole(name: str, device: torch.device) -> None:
    q, k, v = operands()
    mask = MASKS[name]
    parts = []
    for rows in (slice(0, 4), slice(4, 5), slice(5, N)):
        part = None if mask is None else torch.from_numpy(mask[..., rows].copy()).to(device)
        tensors = (torch.from_numpy(t.copy()).to(device) for t in (q, k[:, :, rows], v[:, :, rows]))
        parts.append(merge.dense_attention(*tensors, part, D**-0.5))
    exact, _ = reference(*(t.astype(np.float64) for t in (q, k, v)), mask, False, D**-0.5)
    merged = to_float64(merge.merge_partials(parts))
    np.testing.assert_allclose(merged, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("constant", [False, True])
def test_measured_statistics(constant: bool, device: torch.device) -> None:
    """As numerics defines them; a constant channel gets the least equalizer, not zero."""
    x = gaussian(2, 3, 50, D) * np.geomspace(0.01, 100, D).astype(np.float32) + 7
    if constant:
        x[..., 3] = 2.5
    expected = statistics.measure(x.astype(np.float64))
    for got, want in zip(measure(torch.from_numpy(x).to(device)), expected, strict=True):
        assert got.shape == (2, 3, 1, D)
        np.testing.assert_allclose(to_float64(got), want, rtol=1e-4, atol=1e-6)
