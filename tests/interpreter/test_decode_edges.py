"""What stands before and behind the fused decode kernel, in the Triton interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantforge.numerics.rotation import rotation_matrix
from quantforge.ops.decode_attention.edges import merge_kernel, project_kernel
from quantforge.ops.decode_attention.triton import _rotation
from quantforge.spec import QuantSpec, Rotation
from tests.interpreter import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")

HEADS, KV_HEADS = 2, 1  # a batch of two rows
CPU = torch.device("cpu")


def statistics(dim: int, present: bool, rng: np.random.RandomState) -> list[Any]:
    """Return equalizer and shift (heads, dim), and their strides over batch and head."""
    if not present:
        return [None, None, 0, 0, 0, 0]
    equalizer = torch.from_numpy(rng.uniform(0.5, 2.0, (HEADS, dim)).astype(np.float32))
    shift = torch.from_numpy(rng.standard_normal((HEADS, dim)).astype(np.float32))
    return [equalizer, shift, dim, 0, dim, 0]


@pytest.mark.parametrize("rotation", ["hadamard", "qr"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("rows", "dense_slots", "packed_slots"), [(1, 0, 3), (3, 2, 5), (4, 1, 1), (6, 3, 20)]
)
def test_merge(
    rows: int, dense_slots: int, packed_slots: int, dim: int, rotation: Rotation
) -> None:
    rng = np.random.RandomState(dim + rows)
    spec = QuantSpec(dim, 4, rotation=rotation)
    matrix, unit = _rotation(spec, CPU)
    slots = dense_slots + packed_slots
    partial = rng.standard_normal((HEADS, slots, rows, dim)).astype(np.float32)
    lse = (4 * rng.standard_normal((HEADS, slots, rows))).astype(np.float32)
    lse[:, -1, 0] = -np.inf  # nothing was visible, and nothing written
    partial[:, -1, 0] = np.nan
    logits = rng.standard_normal((HEADS, rows)).astype(np.float32)
    equalizer, shift, *strides = statistics(dim, rows != 3, rng)
    out = torch.full((HEADS, rows, dim), torch.nan)
    out_lse = torch.full((HEADS, rows), torch.nan)
    block, chunk = min(1 << (rows - 1).bit_length(), 4), 8
    merge_kernel[(-(-rows // block), HEADS)](
        torch.from_numpy(partial), torch.from_numpy(lse), torch.from_numpy(logits), matrix,
        equalizer, shift, out, out_lse, slots, dense_slots, rows, unit, *strides,
        HKV=KV_HEADS, DV=dim, ROWS=block, SPLITS=max(1 << (slots - 1).bit_length(), chunk),
        CHUNK=chunk, PDL=False,
    )  # fmt: skip

    lse = lse.astype(np.float64)
    lse[:, dense_slots:] += logits[:, None]
    weights = np.exp2(lse - lse.max(1, keepdims=True))
    mass = weights.sum(1)
    x = np.nan_to_num(partial.astype(np.float64)) * (weights / mass[:, None])[..., None]
    r = matrix.double().numpy() * unit
    want = x[:, dense_slots:].sum(1) @ r
    if equalizer is not None:
        want *= equalizer.double().numpy()[:, None]
        packed = weights[:, dense_slots:].sum(1) / mass
        want += packed[..., None] * shift.double().numpy()[:, None]
    want += x[:, :dense_slots].sum(1)
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-4, atol=1e-5)
    want_lse = (lse.max(1) + np.log2(mass)) * np.log(2)
    np.testing.assert_allclose(out_lse.numpy(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("magnitude", [1.0, 1e6])
@pytest.mark.parametrize(("q_len", "group"), [(1, 4), (3, 2), (5, 4)])
def test_project(q_len: int, group: int, magnitude: float) -> None:
    rng = np.random.RandomState(q_len)
    spec = QuantSpec(64, 4)
    matrix, unit = _rotation(spec, CPU)
    rows, block, scale = q_len * group, -(-q_len * group // 16) * 16, 0.125
    query = (magnitude * rng.standard_normal((HEADS, group, q_len, 64))).astype(np.float32)
    equalizer, shift, *strides = statistics(64, True, rng)
    projected = torch.full((HEADS, block, 64), torch.nan, dtype=torch.float16)
    query_scale = torch.full((HEADS, block // 16), torch.nan)
    logits = torch.full((HEADS, rows), torch.nan)
    x = torch.from_numpy(query)
    project_kernel[(HEADS, 2, block // 16)](
        x, matrix, equalizer, shift, projected, query_scale, logits,
        rows, q_len, scale, unit, *x.stride()[:3], *strides,
        HKV=KV_HEADS, D=64, ROWS=block, COLUMNS=32, PDL=False,
    )  # fmt: skip

    scaled = query.reshape(HEADS, rows, 64) * (scale / np.log(2))
    turned = (scaled * equalizer.numpy()[:, None]) @ rotation_matrix(spec).T
    got = projected.float() * query_scale.repeat_interleave(16, 1)[..., None]
    error = np.abs(got[:, :rows].numpy() - turned).max()
    assert error < 2e-3 * np.abs(turned).max()
    assert not got[:, rows:].any()
    want = (scaled * shift.numpy()[:, None]).sum(-1)
    np.testing.assert_allclose(logits.numpy(), want, rtol=1e-3, atol=1e-3 * magnitude)
