"""The merge of the splits of fused decoding, in the Triton interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.ops.decode_attention.splits import merge_kernel
from tests.interpreter import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")

HEADS = 2


@pytest.mark.parametrize(("dim", "columns"), [(64, 64), (128, 32)])
@pytest.mark.parametrize(("rows", "slots"), [(1, 3), (3, 7), (4, 2), (6, 23)])
def test_merge(rows: int, slots: int, dim: int, columns: int) -> None:
    rng = np.random.RandomState(dim + rows)
    partial = rng.standard_normal((HEADS, slots, rows, dim)).astype(np.float32)
    lse = (4 * rng.standard_normal((HEADS, slots, rows))).astype(np.float32)
    lse[:, -1, 0] = -np.inf  # nothing was visible, and nothing written
    partial[:, -1, 0] = np.nan
    if rows > 1:
        lse[1, :, 1] = -np.inf
        partial[1, :, 1] = np.nan
    out = torch.full((HEADS, rows, dim), torch.nan)
    out_lse = torch.full((HEADS, rows), torch.nan)
    block, chunk = min(1 << (rows - 1).bit_length(), 4), 8
    merge_kernel[(-(-rows // block), dim // columns, HEADS)](
        torch.from_numpy(partial), torch.from_numpy(lse), out, out_lse, slots, rows,
        DV=dim, ROWS=block, COLUMNS=columns, SPLITS=max(1 << (slots - 1).bit_length(), chunk),
        CHUNK=chunk, PDL=False,
    )  # fmt: skip

    logits = lse.astype(np.float64)
    peak = np.maximum(logits.max(1), -1e9)
    weights = np.exp2(logits - peak[:, None])
    mass = np.maximum(weights.sum(1), 1e-300)
    want = (np.nan_to_num(partial.astype(np.float64)) * (weights / mass[:, None])[..., None]).sum(1)
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-4, atol=1e-5)
    want_lse = np.where(weights.sum(1) > 0, peak + np.log2(mass), -np.inf) * np.log(2)
    np.testing.assert_allclose(out_lse.numpy(), want_lse, rtol=1e-5, atol=1e-5)
