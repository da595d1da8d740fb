"""`scores` against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.ops import scores
from quantforge.ops._library import Impl
from quantforge.ops.scores import op
from quantforge.ops.scores.reference import scores as reference
from quantforge.spec import QuantSpec
from quantforge.tensor import QuantTensor
from tests.helpers import (
    FORMS,
    LAYOUTS,
    ODD_SIZES,
    Statistic,
    Store,
    assert_close,
    gaussian,
    make_store,
    naive_scores,
    peak_extra_bytes,
    spec_of,
    threads,
    to_float64,
)

HALF = (torch.float16, torch.bfloat16)


def _check(
    query: torch.Tensor, store: Store, impl: Impl = "auto", **layout: torch.Tensor
) -> torch.Tensor:
    packed = layout.get("packed", store.packed)
    scales = layout.get("scales", store.scales)
    got = scores(query, packed, scales, store.spec, **store.statistics, impl=impl)
    assert got.dtype == query.dtype
    exact = reference(
        to_float64(query), store.encoded, store.spec, store.shift_array, store.equalizer_array
    )
    assert_close(got, [naive_scores(query, store, form) for form in FORMS], exact)
    return got


def _query(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(gaussian(*shape, seed=11)).to(device, dtype)


def test_oracle_by_hand() -> None:
    store = make_store(QuantSpec(64, 8, scale_dtype="float32"), 4)
    query = np.eye(64)[:3]
    got = reference(query, store.encoded, store.spec)
    np.testing.assert_allclose(got, store.exact[:, :3].T, rtol=1e-12)
    np.testing.assert_allclose(got, gaussian(4, 64)[:, :3].T, atol=0.05)


@pytest.mark.parametrize("estimator", ["mse", "prod"])
@pytest.mark.parametrize("dim", [1, 63, 64, 96, 100, 127, 128, 1536])
@pytest.mark.parametrize("bits", range(1, 9))
def test_against_oracle(bits: int, dim: int, estimator: str, device: torch.device) -> None:
    if estimator == "prod" and bits == 1:
        estimator = "mse"
    store = make_store(spec_of(dim, bits, estimator=estimator), 70, device=device)
    _check(_query(3, dim, device=device), store)


@pytest.mark.parametrize("n", [*ODD_SIZES, 9001])
@pytest.mark.parametrize("q", [0, 1, 17])
def test_sizes(q: int, n: int, device: torch.device) -> None:
    store = make_store(QuantSpec(80, 3), n, statistic="shared", device=device)
    _check(_query(q, 80, device=device), store)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_half_precision_queries(
    statistic: Statistic, dtype: torch.dtype, device: torch.device
) -> None:
    store = make_store(QuantSpec(128, 4), 2, 100, statistic=statistic, device=device)
    _check(_query(2, 5, 128, device=device, dtype=dtype), store)


@pytest.mark.parametrize(
    ("query_lead", "lead"),
    [((2, 3), (2, 3)), ((), (2, 3)), ((2, 3), ()), ((2, 1), (1, 3)), ((3,), (2, 1)), ((0,), (0,))],
)
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_leading_axes_broadcast(
    statistic: Statistic, lead: tuple, query_lead: tuple, device: torch.device
) -> None:
    store = make_store(QuantSpec(64, 4), *lead, 50, statistic=statistic, device=device)
    _check(_query(*query_lead, 4, 64, device=device), store)


@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_scales_beyond_fp16(estimator: str, device: torch.device) -> None:
    spec = QuantSpec(64, 4, estimator=estimator, scale_dtype="float32")  # type: ignore[arg-type]
    store = make_store(spec, 40, device=device, magnitude=1e6)
    _check(_query(3, 64, device=device), store)


@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_layouts(layout: str, bits: int, device: torch.device) -> None:
    spec = QuantSpec(64, bits, estimator="prod")
    store = make_store(spec, 2, 50, statistic="per_head", device=device)
    query = LAYOUTS[layout](_query(2, 7, 64, device=device))
    packed, scales = (LAYOUTS[layout](t) for t in (store.packed, store.scales))
    _check(query, store, packed=packed, scales=scales)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_threads(bits: int) -> None:
    store = make_store(QuantSpec(128, bits, estimator="mse"), 6000)
    with threads(3):
        _check(_query(3, 128, device=torch.device("cpu")), store)


@pytest.mark.usefixtures("poison")
def test_rows_do_not_depend_on_their_neighbours(device: torch.device) -> None:
    """A row with NaN for a scale spoils its own column and no other."""
    store = make_store(QuantSpec(64, 4), 300, device=device)
    query = _query(3, 64, device=device)
    clean = scores(query, store.packed, store.scales, store.spec)
    scales, packed = store.scales.clone(), store.packed.clone()
    scales[100:200], packed[100:200] = torch.nan, 0xA5
    got = scores(query, packed, scales, store.spec)
    assert bool(got[:, 100:200].isnan().all())
    keep = torch.ones(300, dtype=torch.bool, device=device)
    keep[100:200] = False
    assert torch.equal(got[:, keep], clean[:, keep])


@pytest.mark.parametrize("bits", [3, 4])
def test_memory_does_not_grow_with_the_history(bits: int, device: torch.device) -> None:
    spec = QuantSpec(128, bits)
    query = _query(4, 128, device=device)
    for n in (1 << 17, 1 << 19):
        width = make_store(spec, 1).encoded.packed.shape[-1]
        packed = torch.full((n, width), 0x5A, dtype=torch.uint8, device=device)
        scales = torch.ones(n, 1, dtype=torch.float16, device=device)
        extra = peak_extra_bytes(lambda p=packed, s=scales: scores(query, p, s, spec), device)
        assert extra < 64 << 20, f"{extra / 2**20:.0f} MiB at {n} vectors"


def test_the_memory_probe_sees_memory(device: torch.device) -> None:
    """The control of the test above: a dense copy of 96 MiB does not go unnoticed."""

    def dense() -> torch.Tensor:
        return torch.zeros(24 << 20, device=device).add_(1)[:1].clone()

    assert 96 << 20 <= peak_extra_bytes(dense, device) <= 97 << 20


CUDA = torch.device("cuda")
DTYPES = (torch.float32, *HALF)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 100, 768, 1536, 4096])
@pytest.mark.parametrize("bits", range(1, 9))
def test_kernels_for_bits_and_dims(bits: int, dim: int, dtype: torch.dtype) -> None:
    store = make_store(spec_of(dim, bits), 70, statistic="shared", device=CUDA)
    for q in (1, 33):
        _check(_query(q, dim, device=CUDA, dtype=dtype), store, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 64, 65, 129, 300])
@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.usefixtures("poison")
def test_kernels_for_numbers_of_queries(bits: int, q: int, dtype: torch.dtype) -> None:
    """Whole rows per program, and rows cut into shares because there are few of them."""
    for n in (300, 20000):
        store = make_store(QuantSpec(256, bits), n, device=CUDA)
        _check(_query(q, 256, device=CUDA, dtype=dtype), store, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [3, 4])
def test_kernels_for_any_alignment(bits: int) -> None:
    """Rows that begin on every multiple of 1, 2, 4, 8 bytes."""
    store = make_store(QuantSpec(768, bits), 50, device=CUDA)
    width = store.packed.shape[-1]
    for gap in (1, 2, 4, 8):
        buffer = torch.full((50, width + gap), 0xA5, dtype=torch.uint8, device=CUDA)
        packed = buffer[:, gap:]
        packed.copy_(store.packed)
        for q in (2, 20):
            query = _query(q, 768, device=CUDA, dtype=torch.float16)
            _check(query, store, "triton", packed=packed)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_bytes_than_32_bits_count() -> None:
    """Rows beyond 2^31 bytes of codes, and scores beyond 2^31 in all."""
    spec, n = QuantSpec(256, 8), (1 << 31) // 256 + 4000
    store = make_store(spec, 1000, device=CUDA)
    packed = torch.zeros((n, 256), dtype=torch.uint8, device=CUDA)
    scales = torch.zeros((n, 1), dtype=torch.float16, device=CUDA)
    packed[-1000:], scales[-1000:] = store.packed, store.scales
    query = _query(260, 256, device=CUDA, dtype=torch.float16)
    expected = scores(query, store.packed, store.scales, spec, impl="triton")
    got = scores(query, packed, scales, spec, impl="triton")
    assert torch.equal(got[:, -1000:], expected)
    assert not bool(got[-1, : n - 1000].any())
    spec = QuantSpec(768, 4)
    store = make_store(spec, 1000, device=CUDA)
    n = (1 << 31) // 384 + 4000
    packed = torch.zeros((n, 384), dtype=torch.uint8, device=CUDA)
    scales = torch.zeros((n, 1), dtype=torch.float16, device=CUDA)
    packed[-1000:], scales[-1000:] = store.packed, store.scales
    query = _query(1, 768, device=CUDA)
    expected = scores(query, store.packed, store.scales, spec, impl="eager")
    got = scores(query, packed, scales, spec, impl="triton")[:, -1000:]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("q", [1, 40])
def test_graph_capture(q: int) -> None:
    store = make_store(QuantSpec(128, 4), 5000, statistic="shared", device=CUDA)
    query = _query(q, 128, device=CUDA)
    arguments = (store.packed, store.scales, store.spec)
    scores(query, *arguments, **store.statistics, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = scores(query, *arguments, **store.statistics, impl="triton")
    query.copy_(query.flip(-1))
    graph.replay()
    assert torch.equal(got, scores(query, *arguments, **store.statistics, impl="triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_linear_layer(batch: int) -> None:
    """A linear layer of packed weights, one token for each of a batch of sequences."""
    store = make_store(QuantSpec(1024, 4), 512, device=CUDA)
    weight = QuantTensor(store.packed, store.scales, store.spec, dtype=torch.bfloat16)
    x = _query(batch, 1, 1024, device=CUDA, dtype=torch.bfloat16)
    got = torch.nn.functional.linear(x, weight)
    assert got.shape == (batch, 1, 512)
    exact = to_float64(x) @ store.exact.T
    assert_close(got, [naive_scores(x, store, form) for form in FORMS], exact)


PACKED = torch.zeros(5, 32, dtype=torch.uint8)
SCALES = torch.zeros(5, 1, dtype=torch.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(3, 63)}, r"query.*64.*got shape \(3, 63\)"),
        ({"query": torch.ones(64)}, r"query and packed must be matrices.*got.*\(64,\)"),
        ({"query": torch.ones(3, 64, dtype=torch.int32)}, "query.*floating.*got torch.int32"),
        ({"query": torch.ones(2, 3, 64), "packed": PACKED.expand(3, 5, 32),
          "scales": SCALES.expand(3, 5, 1)}, r"broadcast; got shapes \(2, 3, 64\).*\(3, 5, 32\)"),
        ({"packed": PACKED[:, :16]}, r"32 bytes.*got.*\(5, 16\)"),
        ({"packed": PACKED.float()}, "uint8.*got torch.float32"),
        ({"scales": SCALES[:4]}, r"\(5, 1\); got.*\(4, 1\)"),
        ({"scales": SCALES.bfloat16()}, "float16.*got torch.bfloat16"),
        ({"shift": torch.ones(2, 1, 64)}, r"shift.*\(5, 64\); got \(2, 1, 64\)"),
        ({"equalizer": torch.ones(5, 64)}, r"equalizer.*\(5, 64\); got \(5, 64\)"),
    ],
)  # fmt: skip
def test_bad_input(changes: dict, message: str) -> None:
    valid = {"query": torch.ones(3, 64), "packed": PACKED, "scales": SCALES, "spec": QuantSpec(64)}
    with pytest.raises(InputError, match=message):
        scores(**{**valid, **changes})


@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_opcheck(estimator: str, statistic: Statistic, device: torch.device) -> None:
    spec = QuantSpec(96, 3, estimator=estimator)  # type: ignore[arg-type]
    store = make_store(spec, 2, 7, statistic=statistic, device=device)
    query = _query(2, 3, 96, device=device)
    arguments = (query, store.packed, store.scales, *store.statistics.values(), spec.key)
    torch.library.opcheck(op.scores, arguments)
