"""Dense attention with log-sum-exp, the merge of segments, and measured statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.numerics import statistics
from quantforge.ops import merge
from quantforge.ops.attention.reference import attention as reference
from quantforge.ops.measure import measure
from tests.helpers import assert_close, gaussian, misaligned, to_float64

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
def test_dense_attention_with_a_softcap(name: str, device: torch.device) -> None:
    q, k, v = operands()
    mask, cap = MASKS[name], 0.7
    tensors = [torch.from_numpy(t).to(device) for t in (q, k, v)]
    on_device = None if mask is None else torch.from_numpy(mask).to(device)
    out, lse = merge.dense_attention(*tensors, on_device, D**-0.5, cap)
    heads = q.shape[1] // k.shape[1]
    k, v = (np.repeat(t.astype(np.float64), heads, 1) for t in (k, v))
    logits = cap * np.tanh(q.astype(np.float64) @ k.swapaxes(2, 3) * D**-0.5 / cap)
    if mask is not None:
        logits = np.where(mask, logits, -np.inf) if mask.dtype == bool else logits + mask
    weights = np.exp(logits)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact_lse, exact = np.log(weights.sum(-1)), weights @ v / weights.sum(-1)[..., None]
    seen = np.isfinite(exact_lse)
    np.testing.assert_allclose(to_float64(lse), exact_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_float64(out)[seen], exact[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("q", "n", "dim"), [(1, 1, 64), (1, 130, 128), (7, 65, 80), (130, 300, 96)]
)
@pytest.mark.parametrize("layout", ["plain", "slice", "odd"])
def test_dense_attention_by_the_flash_kernel(
    layout: str, q: int, n: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half operands of any layout, compared in their dtype; the unfused path is not taken."""
    monkeypatch.delattr(merge, "_matmul_softmax")
    arrays = [gaussian(B, h, rows, dim, seed=h + rows) for h, rows in ((6, q), (2, n), (2, n))]
    tensors = [torch.from_numpy(a).to("cuda", dtype) for a in arrays]
    if layout == "slice":  # a buffer longer than what is filled, heads behind rows
        tensors = [
            torch.cat([t, t], 2).transpose(1, 2).contiguous().transpose(1, 2)[:, :, : t.shape[2]]
            for t in tensors
        ]
    elif layout == "odd":
        tensors = [misaligned(t) for t in tensors]
    out, lse = merge.dense_attention(*tensors, None, dim**-0.5)
    exact, exact_lse = reference(*(to_float64(t) for t in tensors), None, False, dim**-0.5)
    naive = torch.from_numpy(exact).float().cpu(), torch.from_numpy(exact_lse).float()
    assert lse.dtype == torch.float32
    assert_close(out, [naive[0]], exact)
    assert_close(lse.to(dtype), [naive[1]], exact_lse)


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


def test_measured_statistics_of_keys_whose_queries_are_known(device: torch.device) -> None:
    x = gaussian(2, 3, 50, D) * np.geomspace(0.01, 100, D).astype(np.float32)
    query_rms = np.abs(gaussian(2, 3, 1, D)) * np.geomspace(30, 0.1, D).astype(np.float32)
    query_rms[0, 0, 0, 2] = 0.0
    exact = x.astype(np.float64)
    rms = np.sqrt(np.square(exact - exact.mean(-2, keepdims=True)).mean(-2, keepdims=True))
    expected = statistics.key_equalizer(rms, query_rms.astype(np.float64))
    got = measure(torch.from_numpy(x).to(device), torch.from_numpy(query_rms).to(device))[1]
    np.testing.assert_allclose(to_float64(got), expected, rtol=1e-4, atol=1e-6)
