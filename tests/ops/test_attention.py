"""`attention` against the float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.ops import attention
from quantforge.ops._library import Impl, load_backend
from quantforge.ops.attention import op
from quantforge.ops.attention.api import Packed
from quantforge.ops.attention.reference import attention as reference
from quantforge.spec import QuantSpec
from tests.helpers import (
    FORMS,
    LAYOUTS,
    Form,
    Statistic,
    Store,
    assert_close,
    gaussian,
    make_store,
    naive_combine,
    naive_scores,
    peak_extra_bytes,
    spec_of,
    to_float64,
    to_numpy,
)

HALF = (torch.float16, torch.bfloat16)
CUDA = torch.device("cuda")
K4, V4 = QuantSpec(64, 4, scale_rule="norm"), QuantSpec(64, 4, scale_rule="mse")


def _packed(store: Store) -> Packed:
    return Packed(store.packed, store.scales, store.spec, **store.statistics)


def _stores(
    k_spec: QuantSpec,
    v_spec: QuantSpec,
    *shape: int,
    device: torch.device,
    statistic: Statistic = "none",
) -> tuple[Store, Store]:
    key = make_store(k_spec, *shape, statistic=statistic, device=device, seed=1)
    return key, make_store(v_spec, *shape, statistic=statistic, device=device, seed=2)


def _query(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(gaussian(*shape, seed=11)).to(device, dtype)


def naive_attention(
    query: torch.Tensor,
    segments: Sequence[tuple[Store, Store]],
    form: Form,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float = 1 / 8,
    operand: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the concatenation of segments in float32, with all logits in one matrix.

    Keys and values are rounded to `operand` before they are multiplied.
    """
    q_per_kv = query.shape[1] // segments[0][0].packed.shape[1]
    grouped = query.unflatten(1, (-1, q_per_kv)).flatten(2, 3)  # (B, Hkv, q_per_kv * q, dim)
    parts = [naive_scores(grouped, key, form, operand) for key, _ in segments]
    logits = scale * torch.cat(parts, -1).unflatten(2, (q_per_kv, -1)).flatten(1, 2)
    if mask is not None:
        logits = logits + (mask if mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf))
    if is_causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    if not logits.numel():
        lse = logits.new_full(logits.shape[:-1], -torch.inf)
    else:
        lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    weights = weights.unflatten(1, (-1, q_per_kv)).flatten(2, 3)
    sizes = [value.packed.shape[2] for _, value in segments]
    outputs = [
        naive_combine(part, value, form, operand)
        for part, (_, value) in zip(weights.split(sizes, -1), segments, strict=True)
    ]
    return sum(outputs[1:], outputs[0]).unflatten(2, (q_per_kv, -1)).flatten(1, 2), lse


def _assert_close(
    out: torch.Tensor, lse: torch.Tensor, exact: tuple, naive: list[tuple[torch.Tensor, ...]]
) -> None:
    assert_close(out, [evaluation[0] for evaluation in naive], exact[0])
    assert_close(lse, [evaluation[1] for evaluation in naive], exact[1])


def _check(
    query: torch.Tensor,
    key: Store,
    value: Store,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    packed: tuple[Packed, Packed] | None = None,
    impl: Impl = "auto",
    rounds_operands: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare output and log-sum-exp with the oracle and return them.

    Half queries are compared in their dtype on a GPU, whose tensor cores multiply half numbers.
    `rounds_operands` is for a path that rounds rotated keys and values to the query's dtype.
    """
    packed = packed or (_packed(key), _packed(value))
    out, lse = attention(query, *packed, mask=mask, is_causal=is_causal, scale=scale, impl=impl)
    assert out.dtype == lse.dtype == torch.float32
    scale = key.spec.dim**-0.5 if scale is None else scale
    array = None if mask is None else to_numpy(mask)
    exact = reference(to_float64(query), key.exact, value.exact, array, is_causal, scale)
    cpu_mask = None if mask is None else mask.cpu()
    arguments = (cpu_mask, is_causal, scale)
    naive = [naive_attention(query.cpu(), [(key, value)], form, *arguments) for form in FORMS]
    if rounds_operands:
        rounded = (*arguments, query.dtype)
        naive.append(naive_attention(query.cpu(), [(key, value)], "rotated", *rounded))
    is_half = query.is_cuda and query.dtype in HALF
    dtype = query.dtype if is_half else torch.float32
    _assert_close(out.to(dtype), lse.to(dtype), exact, naive)
    return out, lse


def test_oracle_by_hand() -> None:
    """Two keys with logits ln 1 and ln 3: weights 1/4 and 3/4, log-sum-exp ln 4."""
    query = np.array([[[[1.0, 0.0]]]])
    key = np.array([[[[0.0, 5.0], [np.log(3), -5.0]]]])
    value = np.array([[[[4.0], [8.0]]]])
    out, lse = reference(query, key, value, None, False, 1.0)
    np.testing.assert_allclose(out, [[[[7.0]]]], rtol=1e-14)
    np.testing.assert_allclose(lse, [[[np.log(4)]]], rtol=1e-14)
    out, lse = reference(query, key, value, np.array([[[[True, False]]]]), False, 1.0)
    np.testing.assert_allclose(out, [[[[4.0]]]], rtol=1e-14)
    np.testing.assert_allclose(lse, [[[0.0]]], atol=1e-14)
    out, lse = reference(query, key, value, np.full((1, 1, 1, 2), -np.inf), False, 1.0)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


def test_oracle_is_torch_attention() -> None:
    query, key, value = (torch.from_numpy(gaussian(2, h, n, 8, seed=n)).double()
                         for h, n in ((4, 5), (2, 7), (2, 7)))  # fmt: skip
    for is_causal in (False, True):
        out, _ = reference(query.numpy(), key.numpy(), value.numpy(), None, is_causal, 8**-0.5)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, enable_gqa=True
        )
        np.testing.assert_allclose(out, expected.numpy(), rtol=1e-10)


@pytest.mark.parametrize("estimator", ["mse", "prod"])
@pytest.mark.parametrize("dim", [1, 63, 64, 80, 100, 127, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_against_oracle(bits: int, dim: int, estimator: str, device: torch.device) -> None:
    if estimator == "prod" and bits == 1:
        estimator = "mse"
    spec = spec_of(dim, bits, estimator=estimator)
    key, value = _stores(spec, spec, 1, 2, 63, device=device)
    _check(_query(1, 4, 33, dim, device=device), key, value)


@pytest.mark.parametrize("n", [0, 1, 63, 100, 127, 5000])
@pytest.mark.parametrize("q", [0, 1, 17])
@pytest.mark.parametrize("statistic", ["none", "per_head"])
def test_sizes(statistic: Statistic, q: int, n: int, device: torch.device) -> None:
    key, value = _stores(K4, V4, 2, 2, n, device=device, statistic=statistic)
    out, lse = _check(_query(2, 6, q, 64, device=device), key, value)
    if not n:
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


def test_more_queries_than_share_a_pass(device: torch.device) -> None:
    key, value = _stores(K4, V4, 1, 2, 9, device=device)
    mask = torch.from_numpy(gaussian(1, 8, 2500, 9)).to(device)
    _check(_query(1, 8, 2500, 64, device=device), key, value, mask=mask, is_causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 2), (7, 1), (12, 3)])
def test_grouped_queries(heads: int, kv_heads: int, device: torch.device) -> None:
    key, value = _stores(K4, V4, 2, kv_heads, 40, device=device, statistic="per_head")
    mask = torch.from_numpy(gaussian(2, heads, 5, 40) > 0).to(device)
    _check(_query(2, heads, 5, 64, device=device), key, value, mask=mask)


@pytest.mark.parametrize(
    ("k_spec", "v_spec"),
    [
        (QuantSpec(64, 8), QuantSpec(128, 2)),
        (QuantSpec(128, 3), QuantSpec(64, 5)),
        (QuantSpec(192, 4, scale_rule="norm"), QuantSpec(128, 4, scale_rule="mse")),
        (QuantSpec(100, 4, rotation="qr"), QuantSpec(96, 1)),
        (QuantSpec(64, 4, estimator="prod"), QuantSpec(80, 4, codebook="e4m3")),
        (QuantSpec(64, 4, scale_dtype="float32"), QuantSpec(64, 4, seed=9)),
    ],
    ids=lambda spec: f"{spec.dim}-{spec.bits}",
)
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_keys_and_values_differ(
    statistic: Statistic, k_spec: QuantSpec, v_spec: QuantSpec, device: torch.device
) -> None:
    key, value = _stores(k_spec, v_spec, 2, 2, 70, device=device, statistic=statistic)
    _check(_query(2, 4, 33, k_spec.dim, device=device), key, value)


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("kept", ["shift", "equalizer"])
def test_one_statistic_alone(which: str, kept: str, device: torch.device) -> None:
    key, value = _stores(K4, V4, 1, 2, 50, device=device)
    single = make_store(K4, 1, 2, 50, statistic="per_head", device=device)
    arrays = {"shift": single.shift_array, "equalizer": single.equalizer_array}
    alone = Store(
        K4,
        single.encoded,
        arrays["shift"] if kept == "shift" else None,
        arrays["equalizer"] if kept == "equalizer" else None,
        device,
    )
    stores = (alone, value) if which == "key" else (key, alone)
    _check(_query(1, 2, 3, 64, device=device), *stores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_query_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    key, value = _stores(K4, V4, 1, 2, 90, device=device, statistic="per_head")
    _check(_query(1, 4, 3, 64, device=device, dtype=dtype), key, value)


@pytest.mark.parametrize("scale", [1.0, 0.01, 3.0])
def test_scale(scale: float, device: torch.device) -> None:
    """Logits reach +-100 at scale 3: exponentials stay in range."""
    key, value = _stores(K4, V4, 1, 2, 90, device=device, statistic="shared")
    _check(_query(1, 2, 3, 64, device=device), key, value, scale=scale)


MASK_SHAPES = [
    (40,),
    (1, 40),
    (5, 40),
    (1, 1, 40),
    (4, 1, 40),
    (4, 5, 40),
    (1, 1, 1, 40),
    (2, 1, 1, 40),
    (1, 4, 1, 40),
    (1, 1, 5, 40),
    (2, 4, 1, 40),
    (2, 1, 5, 40),
    (1, 4, 5, 40),
    (2, 4, 5, 40),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks(
    shape: tuple[int, ...], kind: torch.dtype, is_causal: bool, device: torch.device
) -> None:
    key, value = _stores(K4, V4, 2, 2, 40, device=device)
    numbers = torch.from_numpy(gaussian(*shape, seed=4))
    mask = numbers > 0
    if kind != torch.bool:
        mask = torch.where(mask, numbers, -torch.inf).to(kind)
    query = _query(2, 4, 5, 64, device=device)
    _check(query, key, value, mask=mask.to(device), is_causal=is_causal)


def test_mask_over_several_tiles(device: torch.device) -> None:
    """Long histories are cut: the mask must be cut at the same places, first tiles all masked."""
    key, value = _stores(K4, V4, 1, 2, 9000, device=device)
    mask = torch.from_numpy(gaussian(1, 4, 3, 9000) > 0)
    mask[:, :, 0, :8500] = False
    mask[:, :, 1, 100:] = False
    _check(_query(1, 4, 3, 64, device=device), key, value, mask=mask.to(device))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("statistic", ["none", "per_head"])
def test_queries_that_see_nothing(
    statistic: Statistic, kind: torch.dtype, device: torch.device
) -> None:
    key, value = _stores(K4, V4, 1, 2, 40, device=device, statistic=statistic)
    mask = torch.ones(1, 1, 3, 40, dtype=torch.bool, device=device)
    mask[:, :, 1] = False
    if kind != torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    out, lse = _check(_query(1, 4, 3, 64, device=device), key, value, mask=mask)
    assert (out[:, :, 1] == 0).all()
    assert (lse[:, :, 1] == -torch.inf).all()


def test_causal_aligns_at_the_upper_left(device: torch.device) -> None:
    key, value = _stores(K4, V4, 1, 1, 7, device=device)
    query = _query(1, 1, 3, 64, device=device)
    out, lse = _check(query, key, value, is_causal=True)
    assert_close(out[0, 0, 0], [value.naive[0, 0, 0]], value.exact[0, 0, 0])
    for i in range(3):
        first = Store(K4, _rows(key, 0, i + 1), None, None, device)
        values = Store(V4, _rows(value, 0, i + 1), None, None, device)
        _, expected = attention(query[:, :, i : i + 1], _packed(first), _packed(values))
        torch.testing.assert_close(lse[:, :, i : i + 1], expected)


def _rows(store: Store, start: int, stop: int) -> Any:
    encoded = store.encoded
    return type(encoded)(encoded.packed[..., start:stop, :], encoded.scales[..., start:stop, :])


def _part(store: Store, start: int, stop: int) -> Store:
    return Store(
        store.spec,
        _rows(store, start, stop),
        store.shift_array,
        store.equalizer_array,
        store.device,
    )


@pytest.mark.parametrize("statistic", ["none", "per_head"])
@pytest.mark.parametrize("cut", [0, 1, 30, 100])
def test_segments_merge_by_lse(statistic: Statistic, cut: int, device: torch.device) -> None:
    """Two segments weighted by exp(lse) are attention over their concatenation.

    The shift of the keys is part of the lse, so a segment may be merged with one that has none.
    """
    key, value = _stores(K4, V4, 1, 2, 100, device=device, statistic=statistic)
    query = _query(1, 4, 3, 64, device=device)
    cuts = ((0, cut), (cut, 100))
    segments = [(_part(key, *rows), _part(value, *rows)) for rows in cuts]
    parts = [_check(query, *segment) for segment in segments]
    exact = reference(to_float64(query), key.exact, value.exact, None, False, 1 / 8)
    naive = [naive_attention(query.cpu(), segments, form) for form in FORMS]
    (first, first_lse), (second, second_lse) = parts
    total = torch.logaddexp(first_lse, second_lse)
    merged = first * (first_lse - total).exp().unsqueeze(-1)
    merged = merged + second * (second_lse - total).exp().unsqueeze(-1)
    _assert_close(merged, total, exact, naive)


def test_merging_with_a_segment_of_another_shift(device: torch.device) -> None:
    """Shifted keys beside unshifted ones, as a cache has them: lse must count the shift."""
    shifted = _stores(K4, V4, 1, 2, 60, device=device, statistic="per_head")
    plain = _stores(QuantSpec(64, 8), QuantSpec(64, 8), 1, 2, 20, device=device)
    query = _query(1, 2, 3, 64, device=device)
    parts = [attention(query, *(_packed(s) for s in segment)) for segment in (shifted, plain)]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (lse - total).exp().unsqueeze(-1) for out, lse in parts)
    keys, values = (
        np.concatenate([a.exact, b.exact], 2) for a, b in zip(shifted, plain, strict=True)
    )
    exact = reference(to_float64(query), keys, values, None, False, 1 / 8)
    naive = [naive_attention(query.cpu(), [shifted, plain], form) for form in FORMS]
    _assert_close(merged, total, exact, naive)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_layouts(layout: str, bits: int, device: torch.device) -> None:
    """Slices of bigger buffers full of NaN, transposed views, odd addresses, outputs of NaN."""
    spec = QuantSpec(64, bits, estimator="prod")
    key, value = _stores(spec, spec, 2, 2, 50, device=device, statistic="per_head")
    arrange = LAYOUTS[layout]
    packed = tuple(
        Packed(arrange(s.packed), arrange(s.scales), s.spec, **s.statistics) for s in (key, value)
    )
    mask = arrange(torch.from_numpy(gaussian(2, 4, 7, 50) > 0).to(device).float())
    query = arrange(_query(2, 4, 7, 64, device=device))
    _check(query, key, value, mask=mask, packed=packed)  # type: ignore[arg-type]


def test_heads_before_or_after_the_sequence(device: torch.device) -> None:
    """Buffers and queries stored (B, n, H, ...) and seen as (B, H, n, ...)."""
    key, value = _stores(K4, V4, 2, 3, 40, device=device)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    packed = tuple(Packed(turned(s.packed), turned(s.scales), s.spec) for s in (key, value))
    query = turned(_query(2, 6, 5, 64, device=device))
    _check(query, key, value, packed=packed)  # type: ignore[arg-type]


def test_batch_of_one_buffer(device: torch.device) -> None:
    """Expanded codes (stride 0), as beams share a prompt."""
    key, value = _stores(K4, V4, 1, 2, 40, device=device)
    query = _query(3, 4, 2, 64, device=device)
    packed = [Packed(s.packed.expand(3, -1, -1, -1), s.scales.expand(3, -1, -1, -1), s.spec)
              for s in (key, value)]  # fmt: skip
    out, lse = attention(query, *packed)
    for row in range(3):
        expected = attention(query[row : row + 1], _packed(key), _packed(value))
        torch.testing.assert_close(out[row : row + 1], expected[0])
        torch.testing.assert_close(lse[row : row + 1], expected[1])


def test_memory_does_not_grow_with_the_history(device: torch.device) -> None:
    query = _query(1, 4, 1, 128, device=device)
    spec = QuantSpec(128, 4)
    for n in (1 << 16, 1 << 18):  # of each of two heads
        packed = torch.full((1, 2, n, 64), 0x5A, dtype=torch.uint8, device=device)
        scales = torch.ones(1, 2, n, 1, dtype=torch.float16, device=device)
        operand = Packed(packed, scales, spec)
        extra = peak_extra_bytes(lambda o=operand: attention(query, o, o)[0], device)
        assert extra < 64 << 20, f"{extra / 2**20:.0f} MiB at {2 * n} tokens"


def test_memory_with_many_queries(device: torch.device) -> None:
    """The matrix of logits would take 512 MiB."""
    query = _query(1, 4, 2048, 64, device=device)
    packed = torch.full((1, 1, 1 << 14, 32), 0x5A, dtype=torch.uint8, device=device)
    operand = Packed(packed, torch.ones(1, 1, 1 << 14, 1, dtype=torch.float16, device=device), K4)
    extra = peak_extra_bytes(lambda: attention(query, operand, operand)[0], device)
    assert extra < 64 << 20, f"{extra / 2**20:.0f} MiB"


def _operand(*shape: int, spec: QuantSpec = K4) -> Packed:
    return Packed(
        torch.zeros(*shape, 32, dtype=torch.uint8),
        torch.zeros(*shape, 1, dtype=torch.float16),
        spec,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(2, 4, 3, 63)}, r"query.*64.*got shape \(2, 4, 3, 63\)"),
        ({"query": torch.ones(4, 3, 64)}, r"\(B, Hq, q, dim\).*got query \(4, 3, 64\)"),
        ({"query": torch.ones(2, 4, 3, 64, dtype=torch.int64)}, "floating.*got torch.int64"),
        ({"query": torch.ones(2, 5, 3, 64)}, r"Hq be a multiple of Hkv; got query \(2, 5, 3, 64\)"),
        ({"query": torch.ones(1, 4, 3, 64)}, r"batch must agree.*got query \(1, 4, 3, 64\)"),
        ({"key": _operand(2, 2, 6)}, r"same B, Hkv and n; got.*\(2, 2, 6, 32\)"),
        ({"value": _operand(2, 1, 7)}, r"same B, Hkv and n; got.*\(2, 1, 7, 32\)"),
        ({"key": _operand(2, 7), "value": _operand(2, 7)}, r"packed \(B, Hkv, n, bytes\).*got"),
        ({"value": _operand(2, 2, 7, spec=QuantSpec(64, 8))}, r"value.*64 bytes.*got"),
        ({"key": _operand(2, 2, 7)._replace(scales=torch.zeros(2, 2, 7))}, r"key.*float16.*got"),
        ({"key": _operand(2, 2, 7)._replace(shift=torch.ones(3, 1, 64))}, r"shift of key.*got"),
        ({"value": _operand(2, 2, 7)._replace(equalizer=torch.ones(32))},
         r"equalizer of value.*got \(32,\)"),
        ({"mask": torch.ones(2, 4, 3, 6)}, r"broadcast to \(2, 4, 3, 7\).*got \(2, 4, 3, 6\)"),
        ({"mask": torch.ones(2, 2, 3, 7)}, r"broadcast to \(2, 4, 3, 7\).*got \(2, 2, 3, 7\)"),
        ({"mask": torch.ones(3, 1)}, r"all of its last axis; got \(3, 1\)"),
        ({"mask": torch.ones(())}, r"broadcast to \(2, 4, 3, 7\).*got \(\)"),
        ({"mask": torch.ones(1, 2, 4, 3, 7)}, r"got \(1, 2, 4, 3, 7\)"),
        ({"mask": torch.ones(3, 7, dtype=torch.int64)}, "bool or floating.*got torch.int64"),
    ],
)  # fmt: skip
def test_bad_input(changes: dict, message: str) -> None:
    valid = {"query": torch.ones(2, 4, 3, 64), "key": _operand(2, 2, 7), "value": _operand(2, 2, 7)}
    with pytest.raises(InputError, match=message):
        attention(**{**valid, **changes})


@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32])
def test_opcheck(masked: torch.dtype | None, statistic: Statistic, device: torch.device) -> None:
    k_spec, v_spec = QuantSpec(96, 3), QuantSpec(64, 4, estimator="prod")
    key, value = _stores(k_spec, v_spec, 2, 2, 7, device=device, statistic=statistic)
    query = _query(2, 4, 3, 96, device=device)
    mask = None if masked is None else torch.ones(3, 7, dtype=masked, device=device)
    operands = [part for s in (key, value) for part in (s.packed, s.scales, *s.statistics.values())]
    arguments = (query, *operands, mask, masked is None, 0.1, k_spec.key, v_spec.key)
    torch.library.opcheck(op.attention, arguments)


# ---- the fused kernels, which half queries reach in full; "triton" never falls back --------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("dim", [63, 64, 80, 96, 100, 112, 128, 192, 256])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.usefixtures("poison")
def test_kernel_bits_and_dims(bits: int, dim: int, dtype: torch.dtype) -> None:
    spec = spec_of(dim, bits)
    key, value = _stores(spec, spec, 1, 2, 300, device=CUDA)
    _check(_query(1, 8, 2, dim, device=CUDA, dtype=dtype), key, value, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 65, 200])
@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_kernel_rows_and_masks(
    bits: int, kind: torch.dtype | None, rows: int, dtype: torch.dtype
) -> None:
    """Every shape of the kernel, some queries blind."""
    spec = QuantSpec(128, bits)
    key, value = _stores(spec, spec, 1, 2, 500, device=CUDA, statistic="per_head")
    mask = None
    if kind is not None:
        numbers = torch.from_numpy(gaussian(rows, 500, seed=4)).to(CUDA)
        seen = (numbers > 0) & (torch.arange(rows, device=CUDA) != 3)[:, None]
        mask = seen if kind == torch.bool else torch.where(seen, numbers, -torch.inf).to(kind)
    query = _query(1, 2, rows, 128, device=CUDA, dtype=dtype)
    _check(query, key, value, mask=mask, is_causal=kind is torch.bool, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.usefixtures("poison")
def test_kernel_layouts(bits: int, layout: str, dtype: torch.dtype) -> None:
    spec, arrange = QuantSpec(64, bits), LAYOUTS[layout]
    key, value = _stores(spec, spec, 2, 2, 130, device=CUDA, statistic="per_head")
    packed = [Packed(arrange(s.packed), arrange(s.scales), s.spec, **s.statistics)
              for s in (key, value)]  # fmt: skip
    query = arrange(_query(2, 4, 7, 64, device=CUDA, dtype=dtype))
    _check(query, key, value, packed=packed, impl="triton")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("bits", "dim"), [(1, 64), (3, 80), (4, 128), (5, 96), (8, 256)])
@pytest.mark.parametrize("statistic", ["none", "per_head"])
@pytest.mark.usefixtures("poison")
def test_extend_by_chunks(
    statistic: Statistic, bits: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough query rows for the flash kernel, a history of several chunks and a rest."""
    backend: Any = load_backend("attention", "triton")
    spec = QuantSpec(dim, bits)
    key, value = _stores(spec, spec, 2, 4, 700, device=CUDA, statistic=statistic)
    query = _query(2, 8, 640, dim, device=CUDA, dtype=dtype)
    grouped = query.reshape(2, 4, -1, dim)
    assert backend.extend.reason_against(grouped, 700, spec, spec) is None
    monkeypatch.setattr(backend.extend.flash, "longest_chunk", lambda *sizes: 256)
    _check(query, key, value, impl="triton", rounds_operands=True)


@pytest.mark.gpu
def test_extend_memory_does_not_grow_with_the_history() -> None:
    spec = QuantSpec(128, 4)
    query = _query(1, 32, 512, 128, device=CUDA, dtype=torch.bfloat16)
    extra = []
    for n in (1 << 15, 1 << 17):
        packed = torch.full((1, 8, n, 64), 0x5A, dtype=torch.uint8, device=CUDA)
        scales = torch.ones(1, 8, n, 1, dtype=torch.float16, device=CUDA)
        operand = Packed(packed, scales, spec)
        run = lambda o=operand: attention(query, o, o, impl="triton")[0]  # noqa: E731
        extra.append(peak_extra_bytes(run, CUDA))
    assert extra[0] == extra[1]


@pytest.mark.gpu
@pytest.mark.parametrize("q", [1, 640])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_capture_without_synchronization(q: int) -> None:
    """A captured call reads what its buffers hold when it is replayed."""
    spec = QuantSpec(128, 4)
    first = _stores(spec, spec, 1, 8, 1000, device=CUDA, statistic="per_head")
    query = _query(1, 32, q, 128, device=CUDA, dtype=torch.bfloat16)
    operands = [_packed(store) for store in first]
    attention(query, *operands, impl="triton")
    try:
        torch.cuda.set_sync_debug_mode("error")
        attention(query, *operands, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention(query, *operands, impl="triton")
    for operand in operands:
        operand.packed.copy_(operand.packed.flip(2))
        operand.scales.copy_(operand.scales.flip(2))
    graph.replay()
    expected = attention(query, *operands, impl="triton")
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("q", [1, 640])
def test_more_bytes_than_an_int32_counts(q: int) -> None:
    """Codes of 2.3 GiB: the last rows, seen alone, are attended to as if they were alone."""
    spec, n, last = QuantSpec(64, 4), (1 << 26) + (1 << 23), 500
    packed = torch.randint(0, 256, (1, 1, n, 32), dtype=torch.uint8, device=CUDA)
    scales = torch.ones(1, 1, n, 1, dtype=torch.float16, device=CUDA)
    query = _query(1, 2, q, 64, device=CUDA, dtype=torch.float16)
    mask = (torch.arange(n, device=CUDA) >= n - last).view(1, 1, 1, n)
    whole = Packed(packed, scales, spec)
    tail = Packed(packed[:, :, -last:], scales[:, :, -last:], spec)
    got = attention(query, whole, whole, mask=mask, impl="triton")
    expected = attention(query, tail, tail, impl="eager")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
