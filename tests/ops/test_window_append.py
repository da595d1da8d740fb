"""`window_append` against the numpy oracle: eager torch and the kernel, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantforge.errors import InputError, UnsupportedError
from quantforge.ops import window_append
from quantforge.ops._library import Impl
from quantforge.ops.window_append import op
from quantforge.spec import QuantSpec
from tests.windows import CASES, Case, Pair, in_rows

IMPLS = [
    pytest.param(("cpu", "auto", torch.float32), id="cpu"),
    pytest.param(("cuda", "eager", torch.float32), id="cuda-eager", marks=pytest.mark.gpu),
    pytest.param(("cuda", "triton", torch.float32), id="cuda-float32", marks=pytest.mark.gpu),
    pytest.param(("cuda", "triton", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu),
]
Where = tuple[str, Impl, torch.dtype]


def _pair(where: Where, case: Case, *, measured: bool) -> Pair:
    return Pair(replace(case, dtype=where[2]), torch.device(where[0]), measured=measured)


def _steps(case: Case) -> list[int]:
    """Return numbers of tokens that fill dense rows and three pages, and then some."""
    total = case.rows + case.pages * case.page + 3
    steps = [min(case.most, 3)]
    while sum(steps) < total:
        steps.append(case.most if len(steps) % 7 == 3 else 1 + len(steps) % min(case.most, 3))
    return steps


@pytest.mark.parametrize("where", IMPLS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_holds_what_the_oracle_holds(case: Case, where: Where) -> None:
    pair = _pair(where, case, measured=True)
    steps = _steps(case)
    for i, q in enumerate(steps):
        pair.append(q, where[1])
        if i % 16 == 5 or i > len(steps) - 5:
            pair.check()
    assert int(pair.window.counts[2, 0]) > 0  # the last tokens found no room
    assert int(pair.window.counts[0, 0]) == case.pages * case.page


@pytest.mark.parametrize("where", IMPLS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fills_a_page_that_a_crop_has_left_in_part(case: Case, where: Where) -> None:
    """Codes that were kept stay, the next ones fill the page, and pages are whole from there on."""
    pair = _pair(where, replace(case, pages=4), measured=True)
    while int(pair.window.counts[0, 0]) < 2 * case.page:
        pair.append(1, where[1])
    pair.crop(1 + case.page // 3)
    pair.check()
    packed = []
    while int(pair.window.counts[2, 0]) == 0:
        pair.append(case.most, where[1])
        pair.check()
        packed.append(int(pair.window.counts[0, 0]))
    kept = 2 * case.page - 1 - case.page // 3
    assert set(packed) == {kept, 2 * case.page, 3 * case.page, 4 * case.page}


@pytest.mark.parametrize("where", IMPLS)
@pytest.mark.parametrize("name", ["pages-4", "rows"])
@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("queries", [True, False])
def test_measures_before_the_first_page(
    queries: bool, shifts: bool, name: str, where: Where
) -> None:
    case = replace(CASES[name], dtype=where[2])
    pair = Pair(case, torch.device(where[0]), measured=False, shifts=shifts, queries=queries)
    while int(pair.window.counts[0, 0]) == 0:
        assert not pair.window.k_statistics[0].any()
        pair.append(1, where[1])
    pair.check_measured(1e-5)
    before = [t.clone() for t in pair.window[6:8]]
    for _ in range(CASES[name].page + 1):
        pair.append(1, where[1])
    assert int(pair.window.counts[0, 0]) == 2 * CASES[name].page
    assert all(torch.equal(a, b) for a, b in zip(before, pair.window[6:8], strict=True))


def test_dims_without_a_kernel(device: torch.device) -> None:
    """An odd factor: eager torch, which on a GPU computes both outcomes."""
    case = in_rows(QuantSpec(48, 4), QuantSpec(80, 5), 8)
    pair = Pair(case, device, measured=True)
    for q in _steps(case):
        pair.append(q)
    pair.check()


@pytest.mark.parametrize("name", ["pages-4", "rows"])
@pytest.mark.parametrize("due", [False, True])
def test_opcheck(name: str, due: bool, device: torch.device) -> None:
    case = CASES[name]
    pair = Pair(case, device, measured=False)
    for _ in range(case.rows if due else 2):
        pair.append(1)
    lead = (case.batch, case.heads, 1)
    new = [torch.randn((*lead, s.dim), device=device) for s in pair.specs]
    args = (*pair.window, *new, case.sinks, case.page, True, True, case.k.key, case.v.key)
    torch.library.opcheck(op.window_append, args)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pages-4", "pages-3", "rows"])
def test_captured_graph_fills_the_window(name: str) -> None:
    """One capture, many replays: only the device knows how full it is."""
    case, device = CASES[name], torch.device("cuda")
    replayed, direct = (Pair(case, device, measured=False) for _ in range(2))
    new = [torch.randn((case.batch, case.heads, 1, s.dim), device=device) for s in (case.k, case.v)]

    def step(pair: Pair) -> None:
        window_append(pair.window, *new, pair.specs, n_sinks=case.sinks, page=case.page)

    step(Pair(case, device, measured=False))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(replayed)
    for i in range(case.rows + 2 * case.page):
        for x in new:
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(i)))
        graph.replay()
        step(direct)
    assert int(direct.window.counts[0, 0]) == 2 * case.page
    for a, b in zip(replayed.window, direct.window, strict=True):
        assert torch.equal(a, b)


def test_refuses_what_does_not_fit() -> None:
    case = CASES["rows"]
    pair = Pair(case, torch.device("cpu"), measured=True)
    key = torch.zeros(case.batch, case.heads, 1, 64)
    value = torch.zeros(case.batch, case.heads, 1, 32)
    sizes = {"n_sinks": case.sinks, "page": case.page}
    for bad in ((key.half(), value), (key, value[:1]), (key[..., :32], value)):
        with pytest.raises(InputError, match="must be torch"):
            window_append(pair.window, *bad, pair.specs, **sizes)
    many = (key.expand(-1, -1, 9, -1), value.expand(-1, -1, 9, -1))
    with pytest.raises(InputError, match="at most 8 tokens"):
        window_append(pair.window, *many, pair.specs, **sizes)
    scattered = pair.window._replace(k_dense=pair.window.k_dense.mT.contiguous().mT)
    with pytest.raises(InputError, match="contiguous"):
        window_append(scattered, key, value, pair.specs, **sizes)
    with pytest.raises(UnsupportedError, match="native"):
        window_append(pair.window, key, value, pair.specs, **sizes, impl="native")
    paged = Pair(CASES["pages-4"], torch.device("cpu"), measured=True)
    x = torch.zeros(2, 2, 1, 128)
    with pytest.raises(InputError, match="hold 64 tokens; got page=8"):
        window_append(paged.window, x, x, paged.specs, n_sinks=4, page=8)
