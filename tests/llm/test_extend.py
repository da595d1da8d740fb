"""A chunk of new tokens against a cache layer: whichever way "causal" is said, the same result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from quantforge import QuantSpec, QuantTensor
from quantforge.llm.paged import PagedRows, PageFormat
from quantforge.llm.segments import SegmentedTensor
from quantforge.numerics.pages import page_layout
from quantforge.ops import quantize
from quantforge.ops.pages import codes_of
from tests.helpers import gaussian

SPEC = QuantSpec(64, 4)


def _segments(pages: bool, tokens: int, own: int) -> tuple[SegmentedTensor, SegmentedTensor]:
    """Four sinks, `tokens` packed ones and `own` recent ones."""
    result = []
    for seed in range(2):
        x = torch.from_numpy(gaussian(1, 2, 4 + tokens + own, 64, seed=seed))
        packed, scales = quantize(x[:, :, 4 : 4 + tokens], SPEC)
        source: QuantTensor | PagedRows = QuantTensor(packed, scales, SPEC, dtype=x.dtype)
        if pages:
            form = PageFormat(page_layout(SPEC, SPEC), SPEC, holds_keys=seed == 0)
            written = form.write(codes_of(packed, 64, 4), scales[..., 0]).contiguous()
            source = PagedRows(written, tokens, form, None, None, x.dtype)
        dense = torch.cat([x[:, :, :4], x[:, :, 4 + tokens :]], 2)
        result.append(SegmentedTensor(dense, source, 4))
    return result[0], result[1]


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("q_len", [3, 40])
def test_causal_masks(q_len: int, pages: bool) -> None:
    key, value = _segments(pages, 128, 40)
    n = key.shape[2]
    query = torch.from_numpy(gaussian(1, 4, q_len, 64, seed=5))
    mask = torch.ones(1, 1, q_len, n, dtype=torch.bool).tril(n - q_len)
    keys, values = (x.dequantize().repeat_interleave(2, 1) for x in (key, value))
    for said, meant in (
        (mask, mask),
        (causal_lower_right(q_len, n), mask),
        (causal_upper_left(q_len, n), torch.ones_like(mask).tril()),
        (None, torch.ones_like(mask)),
    ):
        got = F.scaled_dot_product_attention(query, key, value, attn_mask=said, enable_gqa=True)
        want = F.scaled_dot_product_attention(query, keys, values, attn_mask=meant)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_padding_is_honoured() -> None:
    """A mask that is causal but for a padded token."""
    key, value = _segments(True, 128, 40)
    query = torch.from_numpy(gaussian(1, 4, 40, 64, seed=5))
    mask = torch.ones(1, 1, 40, key.shape[2], dtype=torch.bool).tril(key.shape[2] - 40)
    mask[..., 0] = False
    keys, values = (x.dequantize().repeat_interleave(2, 1) for x in (key, value))
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    want = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
