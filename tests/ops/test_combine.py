"""`combine` against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.ops import combine, dequantize
from quantforge.ops._library import Impl
from quantforge.ops.combine import op
from quantforge.ops.combine.reference import combine as reference
from quantforge.spec import QuantSpec
from tests.helpers import (
    FORMS,
    LAYOUTS,
    ODD_SIZES,
    Statistic,
    Store,
    assert_close,
    gaussian,
    make_store,
    naive_combine,
    peak_extra_bytes,
    spec_of,
    to_float64,
)

HALF = (torch.float16, torch.bfloat16)


def _check(
    weights: torch.Tensor, store: Store, impl: Impl = "auto", **layout: torch.Tensor
) -> None:
    packed = layout.get("packed", store.packed)
    scales = layout.get("scales", store.scales)
    got = combine(weights, packed, scales, store.spec, **store.statistics, impl=impl)
    assert got.dtype == weights.dtype
    exact = reference(
        to_float64(weights), store.encoded, store.spec, store.shift_array, store.equalizer_array
    )
    assert_close(got, [naive_combine(weights, store, form) for form in FORMS], exact)


def _weights(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(gaussian(*shape, seed=12)).to(device, dtype)


def test_oracle_by_hand() -> None:
    store = make_store(QuantSpec(64, 4), 4, statistic="shared")
    weights = np.array([[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, -2.0]])
    got = reference(weights, store.encoded, store.spec, store.shift_array, store.equalizer_array)
    expected = [store.exact[1], 0.5 * store.exact[0] - 2 * store.exact[3]]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ["mse", "prod"])
@pytest.mark.parametrize("dim", [1, 63, 64, 96, 100, 127, 128, 1536])
@pytest.mark.parametrize("bits", range(1, 9))
def test_against_oracle(bits: int, dim: int, estimator: str, device: torch.device) -> None:
    if estimator == "prod" and bits == 1:
        estimator = "mse"
    store = make_store(spec_of(dim, bits, estimator=estimator), 70, device=device)
    _check(_weights(3, 70, device=device), store)


@pytest.mark.parametrize("n", [*ODD_SIZES, 9001])
@pytest.mark.parametrize("q", [0, 1, 17])
def test_sizes(q: int, n: int, device: torch.device) -> None:
    store = make_store(QuantSpec(80, 3), n, statistic="shared", device=device)
    _check(_weights(q, n, device=device), store)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_half_precision_weights(
    statistic: Statistic, dtype: torch.dtype, device: torch.device
) -> None:
    store = make_store(QuantSpec(128, 4), 2, 100, statistic=statistic, device=device)
    _check(_weights(2, 5, 100, device=device, dtype=dtype), store)


@pytest.mark.parametrize(
    ("weights_lead", "lead"),
    [((2, 3), (2, 3)), ((), (2, 3)), ((2, 3), ()), ((2, 1), (1, 3)), ((3,), (2, 1)), ((0,), (0,))],
)
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_leading_axes_broadcast(
    statistic: Statistic, lead: tuple, weights_lead: tuple, device: torch.device
) -> None:
    store = make_store(QuantSpec(64, 4), *lead, 50, statistic=statistic, device=device)
    _check(_weights(*weights_lead, 4, 50, device=device), store)


@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_scales_beyond_fp16(estimator: str, device: torch.device) -> None:
    spec = QuantSpec(64, 4, estimator=estimator, scale_dtype="float32")  # type: ignore[arg-type]
    store = make_store(spec, 40, device=device, magnitude=1e6)
    _check(_weights(3, 40, device=device), store)


@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_layouts(layout: str, bits: int, device: torch.device) -> None:
    spec = QuantSpec(64, bits, estimator="prod")
    store = make_store(spec, 2, 50, statistic="per_head", device=device)
    weights = LAYOUTS[layout](_weights(2, 7, 50, device=device))
    packed, scales = (LAYOUTS[layout](t) for t in (store.packed, store.scales))
    _check(weights, store, packed=packed, scales=scales)


def test_one_hot_weights_decode(device: torch.device) -> None:
    store = make_store(QuantSpec(96, 4), 30, statistic="shared", device=device)
    got = combine(
        torch.eye(30, device=device), store.packed, store.scales, store.spec, **store.statistics
    )
    decoded = dequantize(store.packed, store.scales, store.spec, **store.statistics)
    assert_close(got, [decoded.cpu()], store.exact)


def test_memory_does_not_grow_with_the_history(device: torch.device) -> None:
    spec = QuantSpec(128, 4)
    for n in (1 << 17, 1 << 19):
        packed = torch.full((n, 64), 0x5A, dtype=torch.uint8, device=device)
        scales = torch.ones(n, 1, dtype=torch.float16, device=device)
        weights = torch.ones(4, n, device=device)
        extra = peak_extra_bytes(
            lambda w=weights, p=packed, s=scales: combine(w, p, s, spec), device
        )
        assert extra < 64 << 20, f"{extra / 2**20:.0f} MiB at {n} vectors"


CUDA = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("dim", [64, 80, 100, 128, 768])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.usefixtures("poison")
def test_kernel_for_bits_and_dims(bits: int, dim: int, dtype: torch.dtype) -> None:
    """One range of rows, and several whose sums are added."""
    for q, n in ((1, 5000), (33, 300)):
        store = make_store(spec_of(dim, bits), n, statistic="shared", device=CUDA)
        _check(_weights(q, n, device=CUDA, dtype=dtype), store, "triton")


@pytest.mark.gpu
@pytest.mark.slow
def test_more_bytes_than_32_bits_count() -> None:
    spec, n = QuantSpec(768, 4), (1 << 31) // 384 + 4000
    store = make_store(spec, 1000, device=CUDA)
    packed = torch.zeros((n, 384), dtype=torch.uint8, device=CUDA)
    scales = torch.zeros((n, 1), dtype=torch.float16, device=CUDA)
    packed[-1000:], scales[-1000:] = store.packed, store.scales
    weights = torch.ones(1, n, device=CUDA)
    expected = combine(weights[:, -1000:], store.packed, store.scales, spec, impl="eager")
    got = combine(weights, packed, scales, spec, impl="triton")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


PACKED = torch.zeros(5, 32, dtype=torch.uint8)
SCALES = torch.zeros(5, 1, dtype=torch.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": torch.ones(3, 4)}, r"weights.*5.*got shape \(3, 4\)"),
        ({"weights": torch.ones(5)}, r"weights and packed must be matrices.*got.*\(5,\)"),
        ({"weights": torch.ones(3, 5, dtype=torch.bool)}, "weights.*floating.*got torch.bool"),
        ({"packed": PACKED[:, :16]}, r"32 bytes.*got.*\(5, 16\)"),
        ({"packed": PACKED[0], "scales": SCALES[0]}, r"must be matrices.*got.*\(32,\)"),
        ({"scales": SCALES[:4]}, r"\(5, 1\); got.*\(4, 1\)"),
        ({"shift": torch.ones(2, 1, 64)}, r"shift.*\(5, 64\); got \(2, 1, 64\)"),
        ({"equalizer": torch.ones(63)}, r"equalizer.*\(64,\).*got \(63,\)"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    valid = {"weights": torch.ones(3, 5), "packed": PACKED, "scales": SCALES, "spec": QuantSpec(64)}
    with pytest.raises(InputError, match=message):
        combine(**{**valid, **changes})


@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_opcheck(estimator: str, statistic: Statistic, device: torch.device) -> None:
    spec = QuantSpec(96, 3, estimator=estimator)  # type: ignore[arg-type]
    store = make_store(spec, 2, 7, statistic=statistic, device=device)
    weights = _weights(2, 3, 7, device=device)
    arguments = (weights, store.packed, store.scales, *store.statistics.values(), spec.key)
    torch.library.opcheck(op.combine, arguments)
