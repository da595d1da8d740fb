"""`mixed_search` against its oracle, bit for bit, and against exact inner products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.integers import integer_table, lanes, query_integers
from quantforge.numerics.packing import pack
from quantforge.numerics.vectors import plain_spec
from quantforge.ops import mixed_search
from quantforge.ops.mixed_search import eager
from quantforge.ops.mixed_search.parts import Bounds, Visits, rests_of
from quantforge.ops.mixed_search.reference import mixed_scores
from quantforge.ops.mixed_search.reference import mixed_search as best_rows
from tests.helpers import gaussian, threads

GROUPS = (
    ((4, 96),),
    ((7, 16), (6, 48), (5, 96), (4, 96), (3, 48), (2, 48), (1, 32)),
    ((8, 16), (3, 80), (3, 96), (2, 16), (1, 16)),
    ((5, 13), (3, 7), (1, 100)),
)


class Case:
    """Rows and queries of random codes whose first directions are loud."""

    def __init__(self, groups: tuple[tuple[int, int], ...], n: int, q: int) -> None:
        random = np.random.RandomState(n + q)
        self.specs = tuple(plain_spec(dim, bits, 0) for bits, dim in groups)
        self.codes = [
            np.clip((random.randn(n, s.dim) / 4 + 0.5) * 2**s.bits, 0, 2**s.bits - 1)
            .astype(np.uint8)
            for s in self.specs
        ]  # fmt: skip
        self.packed = tuple(
            torch.from_numpy(pack(codes, s.bits))
            for codes, s in zip(self.codes, self.specs, strict=True)
        )
        dim = sum(s.dim for s in self.specs)
        self.steps = torch.arange(1, dim + 1, dtype=torch.float32) ** -1.0
        self.query = torch.from_numpy(gaussian(q, dim, seed=7)) * self.steps**2
        self.scales = torch.from_numpy(random.rand(n, 1).astype(np.float16) + np.float16(0.5))
        self.offsets = torch.from_numpy((random.randn(n) / 8).astype(np.float16))
        self.base = torch.from_numpy(random.randn(q).astype(np.float32))

    @property
    def arguments(self) -> tuple:
        return self.query, self.packed, self.specs, self.scales, self.offsets, self.base

    def bounds(self, lead: int) -> Bounds:
        return Bounds(lead, self.steps, rests_of(self.packed, self.specs, self.steps, lead))

    def scores(self, unit: float = 1.0) -> np.ndarray:
        return mixed_scores(
            self.query.numpy(), self.codes, list(self.specs), self.scales.numpy()[:, 0],
            self.offsets.numpy(), self.base.numpy(), unit,
        )  # fmt: skip


def check(case: Case, k: int, allowed: np.ndarray | None = None, **options: object) -> None:
    scores = case.scores(0.5)
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
        options["filter_bitmap"] = torch.from_numpy(np.packbits(allowed, bitorder="little"))
    got, rows = mixed_search(*case.arguments, k, unit=0.5, **options)  # type: ignore[arg-type]
    expected = best_rows(scores, k)
    best = np.take_along_axis(scores, expected, 1)
    found = expected.shape[1]
    np.testing.assert_array_equal(got[:, :found].numpy(), best)
    np.testing.assert_array_equal(rows[:, :found].numpy(), np.where(best == -np.inf, -1, expected))
    assert (rows[:, found:] == -1).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [1, 5, 16, 48, 100, 384])
def test_integers_are_near_and_their_sums_fit(dim: int, bits: int) -> None:
    spec, table = plain_spec(dim, bits, 0), integer_table(plain_spec(dim, bits, 0))
    centroids = codebook_of(spec).centroids
    assert np.abs(table.unit * table.values - centroids).max() <= table.unit
    loud = np.sign(gaussian(1, dim, seed=3)) * 3  # every sum as great as it may be
    for query in (gaussian(20, dim, seed=5), loud, np.abs(loud), np.zeros((1, dim), np.float32)):
        z, unit = query_integers(query, spec)
        assert np.abs(z * unit[:, None] - query).max() <= unit.max() / 2 * 1.001
        if table.room:
            for part in (np.maximum(z, 0), np.maximum(-z, 0)):
                sums = np.zeros((len(z), lanes(spec).max() + 1), np.int64)
                np.add.at(sums.T, lanes(spec), part.T)
                assert sums.max() * 2 * table.bias < 2**15
        else:
            assert np.abs(z).sum(-1).max() * table.bias < 2**31
        got, units = eager.query_integers(torch.from_numpy(query), spec)
        np.testing.assert_array_equal(got.numpy(), z)
        np.testing.assert_array_equal(units.numpy(), unit)


@pytest.mark.parametrize("impl", ["eager", "auto"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("n", "q"), [(1, 1), (7, 2), (333, 1), (70, 3), (1001, 5)])
def test_against_oracle(n: int, q: int, groups: tuple, impl: str) -> None:
    case = Case(groups, n, q)
    check(case, 3, impl=impl)
    check(case, 40, np.arange(n) % 3 == 0, impl=impl)


def test_error_is_that_of_integers() -> None:
    case = Case(GROUPS[1], 300, 9)
    exact, start = np.zeros((9, 300)), 0
    for spec, codes in zip(case.specs, case.codes, strict=True):
        part = case.query[:, start : start + spec.dim].double().numpy()
        exact += part @ codebook_of(spec).centroids.astype(np.float64)[codes].T
        start += spec.dim
    exact = exact * case.scales[:, 0].double().numpy()
    got = case.scores(0.0) - case.base[:, None].double().numpy()
    assert np.linalg.norm(got - exact) < 1e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("impl", ["eager", "auto"])
def test_bounds_change_nothing(impl: str) -> None:
    case = Case(GROUPS[1], 3000, 7)
    for lead in (1, 3, 7):
        check(case, 5, bounds=case.bounds(lead), impl=impl)
        check(case, 5, np.arange(3000) % 2 == 1, bounds=case.bounds(lead), impl=impl)


def test_rests_are_bounds() -> None:
    case = Case(GROUPS[1], 200, 1)
    norms, start = np.zeros(200), 0
    for i, (spec, codes) in enumerate(zip(case.specs, case.codes, strict=True)):
        table = integer_table(spec)
        steps = case.steps[start : start + spec.dim].double().numpy()
        if i >= 2:
            norms += np.square(table.values[codes] * float(table.unit) * steps).sum(-1)
        start += spec.dim
    rests = case.bounds(2).rests.double().numpy()
    assert (rests >= np.sqrt(norms)).all()
    assert (rests <= np.sqrt(norms) * 1.003).all()


@pytest.mark.parametrize("impl", ["eager", "auto"])
def test_batches_change_nothing(impl: str) -> None:
    case = Case(GROUPS[2], 500, 11)
    whole = mixed_search(*case.arguments, 9, impl=impl)
    for i in range(11):
        part = slice(i, i + 1)
        one = mixed_search(
            case.query[part], case.packed, case.specs, case.scales, case.offsets, case.base[part],
            9, impl=impl,
        )  # fmt: skip
        for a, b in zip(one, whole, strict=True):
            assert torch.equal(a, b[part])


@pytest.mark.parametrize("impl", ["eager", "auto"])
def test_visits(impl: str) -> None:
    """Each query looks at its own ranges, with its own base in each."""
    case, k = Case(GROUPS[1], 900, 5), 8
    ranges = torch.tensor([[0, 100], [100, 101], [101, 101], [300, 750]])
    visitors = [[0, 3], [0, 1, 2, 3, 4], [2], [1, 3, 4]]
    starts = torch.tensor([0, 2, 7, 8, 11])
    base = torch.from_numpy(gaussian(1, 11, seed=2)[0])
    visits = Visits(ranges, starts, torch.tensor([i for part in visitors for i in part]))
    for bounds in (None, case.bounds(3)):
        got, rows = mixed_search(
            *case.arguments[:-1], base, k, visits=visits, bounds=bounds, impl=impl
        )
        plain = case.scores() - case.base.numpy()[:, None]
        scores, at = np.full((5, 900), -np.inf, np.float32), 0
        case.base[:] = 0
        plain = case.scores()
        for (begin, end), who in zip(ranges.tolist(), visitors, strict=True):
            for query in who:
                scores[query, begin:end] = plain[query, begin:end] + base[at].numpy()
                at += 1
        expected = best_rows(scores, k)
        best = np.take_along_axis(scores, expected, 1)
        np.testing.assert_array_equal(rows.numpy(), np.where(best == -np.inf, -1, expected))
        np.testing.assert_array_equal(got.numpy(), best)


@pytest.mark.parametrize("impl", ["eager", "auto"])
def test_equal_scores_are_ordered_by_row(impl: str) -> None:
    case = Case(GROUPS[1], 5, 2)
    many = tuple(part.repeat(200, 1) for part in case.packed)
    case.scales[:], case.offsets[:] = 1, 0
    arguments = (case.specs, case.scales.repeat(200, 1), case.offsets.repeat(200), case.base)
    _, rows = mixed_search(case.query, many, *arguments, 250, impl=impl)
    order = best_rows(case.scores(), 2)[:, :, None] + 5 * np.arange(200)
    np.testing.assert_array_equal(rows.numpy(), order.reshape(2, -1)[:, :250])


@pytest.mark.parametrize("impl", ["eager", "auto"])
def test_bad_numbers_are_not_found(impl: str) -> None:
    case = Case(GROUPS[0], 50, 3)
    case.query[1, 3] = torch.nan
    case.scales[7] = torch.nan
    case.offsets[9] = -torch.inf
    _, rows = mixed_search(*case.arguments, 50, impl=impl)
    assert (rows[1] == -1).all()
    assert not torch.isin(torch.tensor([7, 9]), rows[0]).any()
    assert (rows[0] >= 0).sum() == 48


def test_threads_change_nothing() -> None:
    case = Case(GROUPS[1], 2000, 40)
    with threads(1):
        one = mixed_search(*case.arguments, 6, bounds=case.bounds(3))
    with threads(3):
        several = mixed_search(*case.arguments, 6, bounds=case.bounds(3))
    assert torch.equal(one[0], several[0])
    assert torch.equal(one[1], several[1])


@pytest.mark.parametrize("impl", ["eager", "auto"])
@pytest.mark.parametrize(("n", "q"), [(0, 3), (5, 0)])
def test_nothing_to_find(n: int, q: int, impl: str) -> None:
    scores, rows = mixed_search(*Case(GROUPS[0], n, q).arguments, 4, impl=impl)
    assert scores.shape == rows.shape == (q, 4)
    assert (rows[:, n:] == -1).all()


def test_refused() -> None:
    case = Case(GROUPS[1], 20, 2)
    query, packed, specs, scales, offsets, base = case.arguments
    for bad in (
        (query[:, 1:], packed, specs, scales, offsets, base),
        (query.double(), packed, specs, scales, offsets, base),
        (query, packed[1:], specs, scales, offsets, base),
        (query, packed, specs, scales.float(), offsets, base),
        (query, packed, specs, scales, offsets[1:], base),
        (query, packed, specs, scales, offsets, base[1:]),
    ):
        with pytest.raises(InputError):
            mixed_search(*bad, 3)
    with pytest.raises(InputError, match="at least 1"):
        mixed_search(*case.arguments, 0)
    with pytest.raises(InputError, match="lead"):
        mixed_search(*case.arguments, 3, bounds=Bounds(9, case.steps, scales[:, 0]))
    with pytest.raises(InputError, match="filter_bitmap"):
        mixed_search(*case.arguments, 3, filter_bitmap=torch.zeros(1, dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("n", "q"), [(1, 1), (1000, 6), (70_000, 90)])
@pytest.mark.parametrize("visiting", [False, True])
def test_gpu_finds_the_same_rows(visiting: bool, n: int, q: int, groups: tuple) -> None:
    case, k = Case(groups, n, q), 10
    query, packed, specs, scales, offsets, base = case.arguments
    allowed = np.random.RandomState(1).random_sample(n) < 0.7
    bitmap = torch.from_numpy(np.packbits(allowed, bitorder="little"))
    here, there = None, None
    if visiting:  # of four unequal ranges, out of order, each query looks at two
        ends = torch.tensor([n // 2, n // 2, n // 9, n])
        ranges = torch.stack([torch.tensor([n // 9, n // 2, 0, n // 2]), ends], 1)
        who = torch.arange(q)
        parts = [who[who % 4 == i] for i in range(4)]
        parts = [torch.cat([parts[i], parts[i - 1]]).sort().values for i in range(4)]
        starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        here = Visits(ranges, starts, torch.cat(parts))
        there = Visits(ranges, starts, torch.cat(parts).cuda())
        base = torch.linspace(-1, 1, len(here.queries))
    rows = (query, packed, specs, scales, offsets, base)
    expected = mixed_search(*rows, k, visits=here, filter_bitmap=bitmap, unit=0.5)
    sent = (
        query.cuda(), tuple(p.cuda() for p in packed), specs, scales.cuda(), offsets.cuda(),
        base.cuda(),
    )  # fmt: skip
    for impl in ("triton", "eager"):
        found = mixed_search(
            *sent, k, visits=there, filter_bitmap=bitmap.cuda(), unit=0.5, impl=impl
        )
        assert torch.equal(found[0].cpu(), expected[0]), impl
        assert torch.equal(found[1].cpu(), expected[1]), impl


def test_one_spec_one_table() -> None:
    """Tables depend on the codebook and the bits alone, but for very long vectors."""
    assert integer_table(plain_spec(64, 4, 0)).bias == integer_table(plain_spec(96, 4, 5)).bias
    assert integer_table(plain_spec(1 << 14, 8, 0)).most < 2047
