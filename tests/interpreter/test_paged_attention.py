"""The kernel of `paged_attention` on the CPU, by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import spec_of
from tests.interpreter import INTERPRET
from tests.ops.test_paged_attention import check, make_pages, query_of

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("k_bits", "v_bits"), [(4, 4), (3, 2), (8, 1)])
@pytest.mark.usefixtures("poison")
def test_pages_of_mixed_lengths(k_bits: int, v_bits: int, dtype: torch.dtype) -> None:
    pages = make_pages(spec_of(64, k_bits), spec_of(48, v_bits), 2, statistic="per_head")
    check(query_of(pages, 4, 1, dtype), pages, "triton")


@pytest.mark.parametrize("q", [3, 20])
def test_several_queries(q: int) -> None:
    pages = make_pages(spec_of(64), spec_of(64), 1, seqlens=(130, 5))
    check(query_of(pages, 2, q, torch.float16), pages, "triton")


@pytest.mark.usefixtures("poison")
def test_more_splits_than_a_short_sequence_has_tokens() -> None:
    pages = make_pages(spec_of(64), spec_of(64), 1, seqlens=(300, 1))
    for bound in (300, 10**5):
        check(query_of(pages, 1, 1, torch.float32), pages, "triton", bound)
