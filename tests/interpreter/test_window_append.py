"""The kernel of `window_append` on the CPU, by Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantforge.numerics.pages import page_layout
from tests.helpers import CPU
from tests.interpreter import INTERPRET
from tests.windows import CASES, Case, Pair

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")


def _jump(pair: Pair, measured: bool) -> None:
    """Fill the dense rows by eager torch, which is faster here, up to one token."""
    while pair.position < pair.case.rows - 1:
        pair.append(min(pair.case.most, pair.case.rows - 1 - pair.position), "eager")
    if measured:
        pair.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_holds_what_the_oracle_holds(case: Case, dtype: torch.dtype) -> None:
    pair = Pair(replace(case, dtype=dtype, batch=1, pages=2), CPU, measured=True)
    _jump(pair, measured=True)
    for _ in range(3):  # the second one packs a page
        pair.append(1, "triton")
        pair.check()
    while int(pair.window.counts[2, 0]) == 0:
        pair.append(case.most, "triton")
        pair.check()


@pytest.mark.parametrize("kept", [1, 0.4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fills_a_page_that_a_crop_has_left_in_part(case: Case, kept: float) -> None:
    pair = Pair(replace(case, batch=1), CPU, measured=True)
    while int(pair.window.counts[0, 0]) < 2 * case.page:
        pair.append(1, "eager")
    pair.crop(case.page - max(1, int(kept * case.page)) if kept < 1 else case.page - 1)
    first = int(pair.window.counts[0, 0])
    while int(pair.window.counts[0, 0]) == first:
        pair.append(case.most, "triton")
    pair.check()
    assert int(pair.window.counts[0, 0]) == 2 * case.page
    while int(pair.window.counts[0, 0]) == 2 * case.page:
        pair.append(case.most, "triton")
    pair.check()


@pytest.mark.parametrize(
    ("name", "shifts", "queries"),
    [("pages-4", True, True), ("rows", True, False), ("rows", False, True)],
)
def test_measures_before_the_first_page(name: str, shifts: bool, queries: bool) -> None:
    pair = Pair(replace(CASES[name], batch=1), CPU, measured=False, shifts=shifts, queries=queries)
    _jump(pair, measured=False)
    pair.append(1, "triton")
    assert not pair.window.v_statistics[0].any()
    pair.append(1, "triton")
    pair.check_measured(1e-5)


def test_writes_only_where_it_should() -> None:
    """Canaries around the page that is written."""
    case = replace(CASES["pages-4"], batch=2)
    pair = Pair(case, CPU, measured=True)
    for t in pair.window[2:4]:
        t.fill_(0xA5)
    _jump(pair, measured=False)
    for _ in range(2):
        pair.append(1, "triton")
    assert page_layout(case.k, case.v).tokens == int(pair.window.counts[0, 0])
    for t in pair.window[2:4]:
        assert bool((t[:, 1:] == 0xA5).all())
        assert not bool((t[:, 0] == 0xA5).all())
