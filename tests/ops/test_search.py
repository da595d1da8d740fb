"""`search` against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import ConfigError, InputError
from quantforge.ops import search
from quantforge.ops.search import eager, op
from quantforge.ops.search.reference import search as reference
from quantforge.spec import QuantSpec
from tests.helpers import (
    LAYOUTS,
    ODD_SIZES,
    Statistic,
    Store,
    gaussian,
    make_store,
    peak_extra_bytes,
    spec_of,
    to_float64,
)

TOLERANCE = 3e-6
"""Of the largest score and shift: float32 sums of products of float32 numbers."""
NEAR_TIE = 1e-3
"""Of the same: rows this near to the k-th best may stand in for it on a GPU."""


def bitmap_of(allowed: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.packbits(allowed, bitorder="little")).to(device)


def check_search(
    query: torch.Tensor,
    store: Store,
    k: int,
    allowed: np.ndarray | None = None,
    impl: str = "auto",
    **layout: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search and compare: every score is that of its row, and no better row is missing."""
    scores, rows = search(
        query,
        layout.get("packed", store.packed),
        layout.get("scales", store.scales),
        store.spec,
        k,
        **store.statistics,
        filter_bitmap=None if allowed is None else bitmap_of(allowed, store.device),
        impl=impl,
    )
    assert scores.dtype == torch.float32
    assert rows.dtype == torch.int64
    n = store.encoded.packed.shape[0]
    assert scores.shape == rows.shape == (query.shape[0], k)
    arguments = (store.spec, max(n, k), store.shift_array, store.equalizer_array, allowed)
    best, order = reference(to_float64(query), store.encoded, *arguments)
    every, _ = reference(to_float64(query), store.encoded, *arguments[:-1])
    shift = 0.0 if store.shift_array is None else to_float64(query) @ store.shift_array.flatten()
    sizes = np.where(np.isfinite(every), np.abs(every), 0.0).max(1, initial=0.0) + np.abs(shift)
    got, at = to_float64(scores), rows.cpu().numpy()
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(best[:, :k]))
    np.testing.assert_array_equal(at == -1, np.isneginf(got))
    for i in range(len(got)):
        found = at[i] >= 0
        count = int(found.sum())
        if not count:
            continue
        assert len(set(at[i][found])) == count, "a row is found twice"
        of_row = dict(zip(order[i].tolist(), best[i].tolist(), strict=True))
        expected = np.array([of_row[row] for row in at[i][found].tolist()])
        np.testing.assert_allclose(got[i][found], expected, atol=TOLERANCE * sizes[i], rtol=0)
        assert (np.diff(got[i][found]) <= 0).all(), "scores must fall"
        slack = NEAR_TIE * sizes[i]
        missing = set(order[i][:count].tolist()) - set(at[i][found].tolist())
        assert all(of_row[row] - best[i][count - 1] <= slack for row in missing)
    return scores, rows


def query_of(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(gaussian(*shape, seed=11)).to(device, dtype)


def test_oracle_by_hand() -> None:
    store = make_store(QuantSpec(64, 8, scale_dtype="float32"), 5)
    exact = (store.exact @ np.eye(64)[:2].T).T
    scores, rows = reference(np.eye(64)[:2], store.encoded, store.spec, 3)
    np.testing.assert_array_equal(rows, np.argsort(-exact, axis=1)[:, :3])
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :3], rtol=1e-12)
    allowed = np.array([True, False, False, False, True])
    scores, rows = reference(np.eye(64)[:1], store.encoded, store.spec, 3, allowed=allowed)
    assert set(rows[0, :2].tolist()) == {0, 4}
    assert rows[0, 2] == -1
    assert scores[0, 2] == -np.inf


@pytest.mark.parametrize("estimator", ["mse", "prod"])
@pytest.mark.parametrize("dim", [1, 63, 64, 96, 128, 768])
@pytest.mark.parametrize("bits", range(1, 9))
def test_against_oracle(bits: int, dim: int, estimator: str, device: torch.device) -> None:
    if estimator == "prod" and bits == 1:
        estimator = "mse"
    store = make_store(spec_of(dim, bits, estimator=estimator), 300, device=device)
    check_search(query_of(3, dim, device=device), store, 10)


@pytest.mark.parametrize("n", [*ODD_SIZES, 9001])
@pytest.mark.parametrize("q", [0, 1, 17])
@pytest.mark.usefixtures("poison")
def test_sizes(q: int, n: int, device: torch.device) -> None:
    store = make_store(QuantSpec(96, 3), n, statistic="shared", device=device)
    check_search(query_of(q, 96, device=device), store, 7)


@pytest.mark.parametrize("k", [1, 10, 100, 128, 200, 201, 500])
@pytest.mark.parametrize("q", [2, 33])
def test_k(q: int, k: int, device: torch.device) -> None:
    store = make_store(QuantSpec(64, 4), 3000, device=device)
    check_search(query_of(q, 64, device=device), store, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("statistic", ["none", "shared"])
def test_dtypes(statistic: Statistic, dtype: torch.dtype, device: torch.device) -> None:
    store = make_store(QuantSpec(128, 4), 1000, statistic=statistic, device=device)
    for q in (5, 40):
        check_search(query_of(q, 128, device=device, dtype=dtype), store, 5)


@pytest.mark.parametrize("share", [0.0, 0.002, 0.5, 1.0])
@pytest.mark.parametrize("q", [3, 20])
def test_filter(q: int, share: float, device: torch.device) -> None:
    """Few rows may be left, or none: the places over say -inf and -1."""
    store = make_store(QuantSpec(64, 4), 2001, statistic="shared", device=device)
    allowed = np.random.RandomState(3).random_sample(2001) < share
    _, rows = check_search(query_of(q, 64, device=device), store, 12, allowed)
    found = rows[rows >= 0].cpu().numpy()
    assert allowed[found].all()


def test_filter_of_words(device: torch.device) -> None:
    store = make_store(QuantSpec(64, 4), 100, device=device)
    allowed = np.random.RandomState(3).random_sample(128) < 0.5
    bytes_ = bitmap_of(allowed, device)
    results = [
        search(
            query_of(2, 64, device=device),
            store.packed,
            store.scales,
            store.spec,
            5,
            filter_bitmap=bitmap,
        )
        for bitmap in (bytes_, bytes_.view(torch.int32))
    ]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("q", [1, 40])
@pytest.mark.parametrize("bits", [4, 5])
def test_equal_scores_are_ordered_by_row(bits: int, q: int, device: torch.device) -> None:
    """The same 50 vectors forty times over: all copies of the best, the smallest rows first."""
    one = make_store(QuantSpec(64, bits), 50, device=device)
    packed, scales = one.packed.repeat(40, 1), one.scales.repeat(40, 1)
    query = query_of(q, 64, device=device)
    _, rows = search(query, packed, scales, one.spec, 100)
    exact = to_float64(query) @ one.exact.T
    best = np.argsort(-exact, axis=1)
    expected = (best[:, :3, None] + 50 * np.arange(40)).reshape(q, -1)[:, :100]
    np.testing.assert_array_equal(rows.cpu().numpy(), expected)


def test_rows_without_a_score_are_not_found(device: torch.device) -> None:
    store = make_store(QuantSpec(64, 4), 600, device=device)
    scales = store.scales.clone()
    scales[100:500] = torch.nan
    for q in (2, 20):
        scores, rows = search(query_of(q, 64, device=device), store.packed, scales, store.spec, 250)
        assert bool(((rows[:, :200] < 100) | (rows[:, :200] >= 500)).all())
        assert bool((rows[:, 200:] == -1).all())
        assert bool((scores[:, 200:] == -torch.inf).all())


@pytest.mark.parametrize("q", [2, 20])
def test_a_query_of_nan_finds_nothing(q: int, device: torch.device) -> None:
    store = make_store(QuantSpec(64, 4), 100, device=device)
    query = query_of(q, 64, device=device)
    query[1, 5] = torch.nan
    _, rows = search(query, store.packed, store.scales, store.spec, 4)
    assert bool((rows[1] == -1).all())
    assert bool((rows[0] >= 0).all())


@pytest.mark.parametrize("impl", ["auto", "eager"])
@pytest.mark.parametrize("with_filter", [False, True])
@pytest.mark.parametrize("k", [1, 3, 4, 40])
@pytest.mark.usefixtures("poison")
def test_several_tiles(
    k: int, with_filter: bool, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 512 rows, 8 groups, the last one ragged: exactly the rows of the oracle."""
    monkeypatch.setitem(eager.TILE_SCORES, "cpu", 1024)
    store = make_store(QuantSpec(64, 4), 512 * 5 + 333)
    allowed = np.random.RandomState(3).random_sample(512 * 5 + 333) < 0.3 if with_filter else None
    query = query_of(2, 64, device=torch.device("cpu"))
    _, rows = check_search(query, store, k, allowed, impl)
    expected = reference(to_float64(query), store.encoded, store.spec, k, allowed=allowed)[1]
    np.testing.assert_array_equal(rows.numpy(), expected)


@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_layouts(layout: str, bits: int, device: torch.device) -> None:
    store = make_store(QuantSpec(64, bits), 500, statistic="shared", device=device)
    move = LAYOUTS[layout]
    for q in (3, 18):
        query = move(query_of(q, 64, device=device))
        check_search(query, store, 5, packed=move(store.packed), scales=move(store.scales))


def test_memory_does_not_grow_with_the_index(device: torch.device) -> None:
    """(q, n) scores of the larger one would be 64 MiB, float32 vectors 256 MiB."""
    spec = QuantSpec(128, 4)
    query = query_of(32, 128, device=device)
    for n in (1 << 17, 1 << 19):
        packed = torch.randint(0, 256, (n, 64), dtype=torch.uint8, device=device)
        scales = torch.ones(n, 1, dtype=torch.float16, device=device)
        extra = peak_extra_bytes(
            lambda p=packed, s=scales: search(query, p, s, spec, 10)[1], device
        )
        assert extra < 56 << 20, f"{extra / 2**20:.0f} MiB at {n} vectors"


@pytest.mark.gpu
@pytest.mark.slow
def test_more_bytes_than_32_bits_count() -> None:
    """The best rows lie beyond 2^31 bytes of codes, and beyond 2^31 in a strided view."""
    device = torch.device("cuda")
    spec = QuantSpec(768, 4)
    n = (1 << 31) // 384 + 5000
    packed = torch.randint(0, 256, (n, 384), dtype=torch.uint8, device=device)
    scales = torch.ones(n, 1, dtype=torch.float16, device=device)
    store = make_store(spec, 1000, device=device)
    planted = slice(n - 1000, n)
    packed[planted], scales[planted] = store.packed, 100 * store.scales
    for q in (1, 30):
        query = query_of(q, 768, device=device)
        exact = to_float64(query) @ store.exact.T
        _, rows = search(query, packed, scales, spec, 3)
        found = np.take_along_axis(exact, rows.cpu().numpy() - (n - 1000), axis=1)
        best = -np.sort(-exact, axis=1)[:, :3]
        np.testing.assert_allclose(found, best, rtol=1e-3)  # two of nearly one score may change


@pytest.mark.gpu
@pytest.mark.parametrize("q", [1, 64])
def test_graph_capture(q: int) -> None:
    device = torch.device("cuda")
    store = make_store(QuantSpec(128, 4), 5000, statistic="shared", device=device)
    query = query_of(q, 128, device=device)
    arguments = (store.packed, store.scales, store.spec, 10)
    search(query, *arguments, **store.statistics)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, rows = search(query, *arguments, **store.statistics)
    query.copy_(query_of(q, 128, device=device).flip(-1))
    graph.replay()
    expected = search(query, *arguments, **store.statistics)
    assert torch.equal(scores, expected[0])
    assert torch.equal(rows, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("q", [1, 8, 9, 100, 300])
@pytest.mark.parametrize("bits", range(1, 9))
def test_triton_finds_what_eager_finds(bits: int, q: int) -> None:
    device = torch.device("cuda")
    store = make_store(QuantSpec(256, bits), 20000, device=device)
    query = query_of(q, 256, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        asked = query.to(dtype)
        arguments = (asked, store.packed, store.scales, store.spec, 10)
        scores, rows = search(*arguments, impl="triton")
        expected, at = search(*arguments, impl="eager")
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)
        assert float((rows == at).float().mean()) > 0.999  # near ties may swap


QUERY = torch.ones(3, 64)
PACKED = torch.zeros(20, 32, dtype=torch.uint8)
SCALES = torch.zeros(20, 1, dtype=torch.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(3, 63)}, r"query.*64.*got shape \(3, 63\)"),
        ({"query": torch.ones(2, 3, 64)}, r"query \(q, dim\).*got shapes \(2, 3, 64\)"),
        ({"k": 0}, "k must be an integer of at least 1; got 0"),
        ({"k": True}, "k must be an integer of at least 1; got True"),
        ({"packed": PACKED[:, :16]}, r"32 bytes.*got.*\(20, 16\)"),
        ({"scales": SCALES[:4]}, r"\(20, 1\); got.*\(4, 1\)"),
        ({"shift": torch.ones(2, 1, 64)}, r"shift.*got \(2, 1, 64\)"),
        ({"filter_bitmap": torch.zeros(2, dtype=torch.uint8)}, "3 bytes for 20 rows.*got"),
        ({"filter_bitmap": torch.zeros(20, dtype=torch.bool)}, "3 bytes.*got torch.bool"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    valid = {"query": QUERY, "packed": PACKED, "scales": SCALES, "spec": QuantSpec(64), "k": 3}
    with pytest.raises(InputError, match=message):
        search(**{**valid, **changes})


def test_unknown_backend() -> None:
    with pytest.raises(ConfigError, match=r"impl must be one of.*got 'best'"):
        search(QUERY, PACKED, SCALES, QuantSpec(64), 3, impl="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("with_filter", [False, True])
@pytest.mark.parametrize("statistic", ["none", "shared"])
def test_opcheck(statistic: Statistic, with_filter: bool, device: torch.device) -> None:
    store = make_store(QuantSpec(96, 3), 17, statistic=statistic, device=device)
    bitmap = bitmap_of(np.arange(17) % 2 == 0, device) if with_filter else None
    query = query_of(2, 96, device=device)
    tensors = (query, store.packed, store.scales, *store.statistics.values(), bitmap)
    torch.library.opcheck(op.search, (*tensors, 4, store.spec.key))
