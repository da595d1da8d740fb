"""The kernels of `attention` on the CPU, by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from quantforge.errors import UnsupportedError
from quantforge.ops import attention
from quantforge.ops.attention.api import Packed
from quantforge.ops.attention.reference import attention as reference
from quantforge.spec import QuantSpec
from tests.helpers import (
    FORMS,
    LAYOUTS,
    Statistic,
    Store,
    assert_close,
    gaussian,
    make_store,
    spec_of,
    to_float64,
    to_numpy,
)
from tests.interpreter import INTERPRET
from tests.ops.test_attention import MASK_SHAPES, naive_attention

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")

K4, V4 = QuantSpec(64, 4, scale_rule="norm"), QuantSpec(64, 4, scale_rule="mse")
SMALL = QuantSpec(16, 4)


def _stores(
    k_spec: QuantSpec, v_spec: QuantSpec, *shape: int, statistic: Statistic = "none", **more: Any
) -> tuple[Store, Store]:
    key = make_store(k_spec, *shape, statistic=statistic, seed=1, **more)
    return key, make_store(v_spec, *shape, statistic=statistic, seed=2, **more)


def _query(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(gaussian(*shape, seed=11)).to(dtype)


def _operand(store: Store, arrange: Callable[[torch.Tensor], torch.Tensor]) -> Packed:
    return Packed(arrange(store.packed), arrange(store.scales), store.spec, **store.statistics)


def _check(
    query: torch.Tensor,
    key: Store,
    value: Store,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    arrange: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare with the oracle in the dtype of the query and return what came."""
    operands = (_operand(store, arrange) for store in (key, value))
    out, lse = attention(
        query, *operands, mask=mask, is_causal=is_causal, scale=scale, impl="triton"
    )
    assert out.dtype == lse.dtype == torch.float32
    scale = key.spec.dim**-0.5 if scale is None else scale
    array = None if mask is None else to_numpy(mask)
    exact = reference(to_float64(query), key.exact, value.exact, array, is_causal, scale)
    naive = [naive_attention(query, [(key, value)], form, mask, is_causal, scale) for form in FORMS]
    for i, got in enumerate((out, lse)):
        assert_close(got.to(query.dtype), [pair[i] for pair in naive], exact[i])
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [1, 63, 64, 80, 100])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.usefixtures("poison")
def test_bits_and_dims(bits: int, dim: int, dtype: torch.dtype) -> None:
    if dim == 1:  # values cancel; how their rounding errors do is a matter of luck in float32
        dtype = torch.float16
    spec = spec_of(dim, bits)
    _check(_query(1, 2, 7, dim, dtype=dtype), *_stores(spec, spec, 1, 1, 37))


@pytest.mark.parametrize("dim", [96, 112, 128, 192, 256])
@pytest.mark.parametrize("bits", [3, 4])
def test_dims(bits: int, dim: int) -> None:
    spec = spec_of(dim, bits)
    _check(_query(1, 1, 2, dim, dtype=torch.float16), *_stores(spec, spec, 1, 1, 37))


@pytest.mark.parametrize(
    ("k_spec", "v_spec"),
    [
        (QuantSpec(64, 8), QuantSpec(128, 2)),
        (QuantSpec(128, 3), QuantSpec(64, 5)),
        (QuantSpec(100, 4, rotation="qr"), QuantSpec(96, 1)),
        (QuantSpec(64, 4, scale_dtype="float32"), QuantSpec(80, 4, codebook="e4m3", seed=9)),
    ],
    ids=lambda spec: f"{spec.dim}-{spec.bits}",
)
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
def test_keys_and_values_differ(statistic: Statistic, k_spec: QuantSpec, v_spec: QuantSpec) -> None:
    _check(_query(2, 4, 2, k_spec.dim), *_stores(k_spec, v_spec, 2, 2, 40, statistic=statistic))


@pytest.mark.parametrize("n", [0, 1, 65, 300])
@pytest.mark.parametrize("q", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.usefixtures("poison")
def test_sizes(dtype: torch.dtype, q: int, n: int) -> None:
    """From no key to several splits of several tiles."""
    stores = _stores(K4, V4, 1, 2, n, statistic="per_head")
    out, lse = _check(_query(1, 4, q, 64, dtype=dtype), *stores)
    if not n:
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("rows", [16, 17, 33, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numbers_of_query_rows(dtype: torch.dtype, rows: int) -> None:
    mask = torch.from_numpy(gaussian(rows, 70) > 0)
    stores = _stores(K4, V4, 1, 1, 70)
    _check(_query(1, 1, rows, 64, dtype=dtype), *stores, mask=mask)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 2), (7, 1), (6, 3)])
def test_grouped_queries(heads: int, kv_heads: int) -> None:
    stores = _stores(K4, V4, 2, kv_heads, 40, statistic="per_head")
    mask = torch.from_numpy(gaussian(2, heads, 3, 40) > 0)
    _check(_query(2, heads, 3, 64), *stores, mask=mask)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks(shape: tuple[int, ...], kind: torch.dtype, is_causal: bool) -> None:
    numbers = torch.from_numpy(gaussian(*shape, seed=4))
    mask = numbers > 0
    if kind != torch.bool:
        mask = torch.where(mask, numbers, -torch.inf).to(kind)
    stores = _stores(SMALL, SMALL, 2, 2, 40)
    _check(_query(2, 4, 5, 16), *stores, mask=mask, is_causal=is_causal)


@pytest.mark.parametrize("q", [1, 5, 90])
def test_causal(q: int) -> None:
    """Fewer, as many and more queries than keys."""
    _check(_query(1, 2, q, 64), *_stores(K4, V4, 1, 1, 70), is_causal=True)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.usefixtures("poison")
def test_queries_that_see_nothing(dtype: torch.dtype, kind: torch.dtype) -> None:
    """One query is blind, one sees only the last tile, one only the first."""
    mask = torch.ones(1, 1, 4, 400, dtype=torch.bool)
    mask[:, :, 1] = False
    mask[:, :, 2, :390] = False
    mask[:, :, 3, 1:] = False
    if kind != torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    stores = _stores(K4, V4, 1, 2, 400, statistic="per_head")
    out, lse = _check(_query(1, 4, 4, 64, dtype=dtype), *stores, mask=mask)
    assert (out[:, :, 1] == 0).all()
    assert (lse[:, :, 1] == -torch.inf).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.usefixtures("poison")
def test_layouts(dtype: torch.dtype, bits: int, layout: str) -> None:
    """Rows amid NaN scales and garbage bytes: nothing outside of them counts."""
    spec, arrange = QuantSpec(64, bits), LAYOUTS[layout]
    stores = _stores(spec, spec, 2, 2, 50, statistic="per_head")
    mask = arrange(torch.from_numpy(gaussian(2, 4, 3, 50) > 0).float())
    query = arrange(_query(2, 4, 3, 64, dtype=dtype))
    _check(query, *stores, mask=mask, arrange=arrange)


def test_heads_before_or_after_the_sequence() -> None:
    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    _check(turned(_query(2, 6, 5, 64)), *_stores(K4, V4, 2, 3, 40), arrange=turned)


def test_batch_of_one_buffer() -> None:
    """Expanded codes (stride 0), as beams share a prompt."""
    key, value = _stores(K4, V4, 1, 2, 40)
    query = _query(3, 4, 2, 64)
    many = (_operand(s, lambda x: x.expand(3, -1, -1, -1)) for s in (key, value))
    out, lse = attention(query, *many, impl="triton")
    for row in range(3):
        expected = _check(query[row : row + 1], key, value)
        torch.testing.assert_close(out[row : row + 1], expected[0])
        torch.testing.assert_close(lse[row : row + 1], expected[1])


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 200.0])
def test_half_operands_do_not_overflow(magnitude: float) -> None:
    """Values and queries of any magnitude: fp16 holds only their ratios."""
    spec = QuantSpec(64, 4, scale_dtype="float32")
    key = make_store(spec, 1, 1, 90, seed=1)
    value = make_store(spec, 1, 1, 90, seed=2, magnitude=magnitude * 100)
    _check(_query(1, 2, 3, 64, dtype=torch.float16) * magnitude, key, value, scale=0.1 / magnitude)


def test_values_of_unequal_magnitude() -> None:
    """The greatest scale arrives last and is far above the others."""
    value = make_store(V4, 1, 1, 400, seed=2)
    scales = value.encoded.scales.copy()
    scales[0, 0, -1] *= 500
    encoded = type(value.encoded)(value.encoded.packed, scales)
    loud = Store(V4, encoded, None, None)
    _check(_query(1, 2, 3, 64, dtype=torch.float16), make_store(K4, 1, 1, 400, seed=1), loud)


def test_splits_agree() -> None:
    """Few heads split their tokens, many do not: the same rows give the same result."""
    key, value = _stores(K4, V4, 1, 1, 300)
    query = _query(1, 2, 1, 64)
    out, lse = attention(query, *(_operand(s, lambda x: x) for s in (key, value)), impl="triton")
    wide = (_operand(s, lambda x: x.expand(20, -1, -1, -1)) for s in (key, value))
    many = attention(query.expand(20, -1, -1, -1), *wide, impl="triton")
    torch.testing.assert_close(many[0][:1], out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(many[1][:1], lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "dtype", "reason"),
    [
        (QuantSpec(64, 4, estimator="prod"), torch.float32, "QJL residual"),
        (QuantSpec(512, 4), torch.float32, "dim 512 is more than 256"),
        (QuantSpec(64, 4), torch.bfloat16, "interpreter gets bfloat16 wrong"),
    ],
)
def test_reasons(spec: QuantSpec, dtype: torch.dtype, reason: str) -> None:
    stores = _stores(spec, spec, 1, 1, 3)
    operands = (_operand(s, lambda x: x) for s in stores)
    with pytest.raises(UnsupportedError, match=reason):
        attention(_query(1, 1, 1, spec.dim, dtype=dtype), *operands, impl="triton")


@pytest.mark.parametrize(
    ("bits", "dim"), [(1, 64), (2, 80), (3, 63), (3, 64), (4, 128), (5, 112), (7, 63), (8, 80)]
)
def test_chunks(dim: int, bits: int) -> None:
    """`extend` decodes chunks in rotated space and merges what a dense kernel makes of them."""
    from quantforge.ops import constants
    from quantforge.ops.attention.triton import operand_of
    from quantforge.ops.kernels.chunk import decode_chunk, merge_chunk

    spec = spec_of(dim, bits)
    store = make_store(spec, 2, 3, 50)
    operand = operand_of(store.packed, store.scales, spec, half=True)
    queries = torch.from_numpy(gaussian(6, 4, dim)) * dim**-0.5
    out = torch.full((6, 4, dim), torch.nan)
    lse = torch.full((6, 4), torch.nan)
    for first, count in ((0, 40), (40, 10)):
        chunk = torch.full((2, 6, 40, dim), torch.nan)
        decode_chunk[(3, 6, 2)](
            *(operand.packed, operand.scales, operand.table, chunk[0]) * 2,
            *(first, count, 40, 3),
            *operand.strides * 2,
            K=operand.codes, V=operand.codes, K_DIM=dim, V_DIM=dim, ROWS=16,
        )  # fmt: skip
        assert torch.equal(torch.isnan(chunk[0]).all(-1), torch.arange(40).expand(6, 40) >= count)
        part_lse = (queries @ chunk[0, :, :count].mT).logsumexp(-1)
        part = (queries @ chunk[0, :, :count].mT).softmax(-1) @ chunk[0, :, :count]
        merge_chunk[(2, 6)](
            *(out, lse, part, part_lse, 4, 3),
            *(3 * part.stride(0), part.stride(0), part.stride(1)),
            *(3 * part_lse.stride(0), part_lse.stride(0), part_lse.stride(1)),
            DIM=dim, COLUMNS=128, ROWS=2, IS_FIRST=first == 0,
        )  # fmt: skip
    rotation = to_float64(constants.rotation(spec, spec.seed, store.packed.device))
    rotated = store.exact.reshape(6, 50, dim) @ rotation.T
    logits = to_float64(queries) @ np.swapaxes(rotated, -1, -2)
    weights = np.exp(logits)
    mass = weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(to_float64(lse), np.log(mass)[..., 0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(to_float64(out), weights @ rotated / mass, rtol=2e-3, atol=2e-3)
