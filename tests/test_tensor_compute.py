"""Products with a `QuantTensor`, as a table: each against the same function of the decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quantforge import InputError, QuantTensor, UnsupportedError
from quantforge.ops._library import Impl
from quantforge.ops.attention.api import Packed, attention
from tests.helpers import Store, assert_close, make_store, spec_of
from tests.test_tensor_views import (
    MODES,
    VARIANTS,
    B,
    D,
    Dense,
    H,
    N,
    aten,
    normal,
    repeat_kv,
    store_of,
    tensor_of,
)

# ---- the table: operations that compute ------------------------------------------------------


MASK = torch.arange(5 * N).view(5, N) % 3 != 1
COMPUTE: dict[str, Callable[[torch.Tensor, Dense], torch.Tensor]] = {
    "linear": lambda x, r: F.linear(r(7, x.shape[-1]), x[0, 0]),
    "linear bias": lambda x, r: F.linear(r(2, 3, x.shape[-1]), x[0, 0], r(N)),
    "linear vector": lambda x, r: F.linear(r(x.shape[-1]), x[1, 0], r(N)),
    "linear of packed": lambda x, r: F.linear(x[0], r(5, x.shape[-1])),
    "aten.linear": lambda x, r: aten.linear.default(r(7, x.shape[-1]), x[0, 0], r(N)),
    "matmul": lambda x, r: torch.matmul(r(B, H, 5, x.shape[-1]), x.mT),
    "Tensor.matmul": lambda x, r: r(B, H, 5, N).matmul(x),
    "@": lambda x, r: r(5, N) @ x[0, 0],
    "@ .T": lambda x, r: r(5, x.shape[-1]) @ x[0, 0].T,
    "@ 1-D": lambda x, r: r(N) @ x,
    "@ 1-D .mT": lambda x, r: r(x.shape[-1]) @ x.mT,
    "@ 3-D": lambda x, r: r(H, 5, N) @ x[0],
    "@ 3-D .mT": lambda x, r: r(H, 5, x.shape[-1]) @ x[0].mT,
    "@ 3-D by 2-D": lambda x, r: r(4, 5, x.shape[-1]) @ x[0, 0].mT,
    "@ 2-D by 3-D": lambda x, r: r(5, N) @ x[0],
    "@ 4-D by 2-D": lambda x, r: r(B, 4, 5, N) @ x[0, 0],
    "@ 4-D by 3-D": lambda x, r: r(B, H, 5, x.shape[-1]) @ x[0].mT,
    "@ broadcast": lambda x, r: r(B, 1, 5, x.shape[-1]) @ x.mT,
    "@ broadcast packed": lambda x, r: r(B, H, 5, N) @ x[:1],
    "@ vector": lambda x, r: r(2, 5, x.shape[-1]) @ x[0, 0, 3],
    "vector @ vector": lambda x, r: r(x.shape[-1]) @ x[0, 0, 3],
    "packed @": lambda x, r: x @ r(x.shape[-1], 5),
    "packed @ 4-D": lambda x, r: x @ r(B, H, x.shape[-1], 5),
    "packed @ 1-D": lambda x, r: x @ r(x.shape[-1]),
    "packed .mT @": lambda x, r: x.mT @ r(N, 5),
    "packed vector @": lambda x, r: x[0, 0, 3] @ r(x.shape[-1], 5),
    "packed vector @ vector": lambda x, r: x[0, 0, 3] @ r(x.shape[-1]),
    "__rmatmul__": lambda x, r: x[0, 0].__rmatmul__(r(5, N)),
    "mm": lambda x, r: torch.mm(r(5, N), x[0, 0]),
    "Tensor.mm": lambda x, r: r(5, x.shape[-1]).mm(x[0, 0].t()),
    "aten.mm": lambda x, r: aten.mm.default(r(5, N), x[0, 0]),
    "bmm": lambda x, r: torch.bmm(r(H, 5, N), x[0]),
    "Tensor.bmm": lambda x, r: r(H, 5, N).bmm(x[0]),
    "aten.bmm": lambda x, r: aten.bmm.default(r(H, 5, N), x[0]),
    "mv": lambda x, r: torch.mv(x[0, 0], r(x.shape[-1])),
    "Tensor.mv": lambda x, r: x[0, 0].mv(r(x.shape[-1])),
    "aten.mv": lambda x, r: aten.mv.default(x[0, 0], r(x.shape[-1])),
    "addmm": lambda x, r: torch.addmm(r(N), r(5, x.shape[-1]), x[0, 0].mT, beta=0.5, alpha=2),
    "Tensor.addmm": lambda x, r: r(5, x.shape[-1]).addmm(r(5, N), x[0, 0]),
    "aten.addmm": lambda x, r: aten.addmm.default(r(5, N), r(5, x.shape[-1]), x[0, 0].mT),
    "aten.matmul": lambda x, r: aten.matmul.default(r(B, H, 5, N), x),
    "no rows": lambda x, r: r(B, H, 0, N) @ x,
    "no keys": lambda x, r: r(B, H, 5, x.shape[-1]) @ x[:, :, :0].mT,
    "sum of no rows": lambda x, r: r(B, H, 5, 0) @ x[:, :, :0],
    # eager attention of transformers
    "repeat_kv scores": lambda x, r: r(B, 4 * H, 5, x.shape[-1]) @ repeat_kv(x, 4).transpose(2, 3),
    "repeat_kv values": lambda x, r: r(B, 4 * H, 5, N) @ repeat_kv(x, 4),
    "repeat_kv broadcast": lambda x, r: r(B, 1, 5, N) @ repeat_kv(x, 2),
    "repeat_kv no rows": lambda x, r: r(B, 4 * H, 0, N) @ repeat_kv(x, 4),
}


def sdpa(heads: int = H, batch: int = B, **options: Any) -> Any:
    return lambda x, r: F.scaled_dot_product_attention(
        r(batch, heads, 5, x.shape[-1]), x, x.flip(-2), **options
    )


COMPUTE |= {
    "sdpa": sdpa(),
    "sdpa causal": sdpa(is_causal=True),
    "sdpa scale": sdpa(scale=0.3),
    "sdpa enable_gqa": sdpa(heads=4 * H, enable_gqa=True),
    "sdpa broadcast batch": sdpa(batch=1),
    "sdpa mask bool": lambda x, r: F.scaled_dot_product_attention(
        r(B, H, 5, x.shape[-1]), x, x, attn_mask=MASK.to(x.device)
    ),
    "sdpa mask float": lambda x, r: F.scaled_dot_product_attention(
        r(B, H, 5, x.shape[-1]), x, x, r(B, 1, 5, N)
    ),
    "sdpa mask of queries": lambda x, r: F.scaled_dot_product_attention(
        r(B, H, 5, x.shape[-1]), x, x, attn_mask=r(B, H, 5, 1)
    ),
    "sdpa 3-D": lambda x, r: F.scaled_dot_product_attention(
        r(H, 5, x.shape[-1]), x[0], x[1], attn_mask=MASK.to(x.device)
    ),
    "sdpa 2-D": lambda x, r: F.scaled_dot_product_attention(
        r(5, x.shape[-1]), x[0, 1], x[1, 2], is_causal=True
    ),
    "sdpa one key for all": lambda x, r: F.scaled_dot_product_attention(
        r(3, H, 5, x.shape[-1]), x[:1].expand(3, -1, -1, -1), x[1:].expand(3, -1, -1, -1)
    ),
    "sdpa repeat_kv": lambda x, r: F.scaled_dot_product_attention(
        r(B, 4 * H, 5, x.shape[-1]), repeat_kv(x, 4), repeat_kv(x.flip(0), 4), is_causal=True
    ),
    "sdpa repeat_kv mask": lambda x, r: F.scaled_dot_product_attention(
        r(B, 2 * H, 5, x.shape[-1]), repeat_kv(x, 2), repeat_kv(x, 2), r(B, 2 * H, 5, N)
    ),
    "sdpa repeated unlike": lambda x, r: F.scaled_dot_product_attention(
        r(B, 2 * H, 5, x.shape[-1]), repeat_kv(x, 2), x.repeat_interleave(2, dim=1)
    ),
    "aten.sdpa": lambda x, r: aten.scaled_dot_product_attention.default(
        r(B, H, 5, x.shape[-1]), x, x, None, 0.0, True
    ),
}

Q = (B, H, 5)
BACKENDS: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple]] = {
    # the backends' operators exist for some devices only: compared with F.sdpa, causal
    "_flash_attention_for_cpu": lambda q, x: (
        aten._scaled_dot_product_flash_attention_for_cpu.default(q, x, x, 0.0, True)
    ),
    "_efficient_attention": lambda q, x: aten._scaled_dot_product_efficient_attention.default(
        q, x, x, None, True, 0.0, True
    ),
    "_flash_attention": lambda q, x: aten._scaled_dot_product_flash_attention.default(
        q, x, x, 0.0, True
    ),
    "_cudnn_attention": lambda q, x: aten._scaled_dot_product_cudnn_attention.default(
        q, x, x, None, True, 0.0, True
    ),
}


# ---- tests -----------------------------------------------------------------------------------


def one_unit_off(x: torch.Tensor) -> list[torch.Tensor]:
    """Return x with each number moved by one unit in the last place, up or down, three times.

    A product with a single result may be exact by luck; its neighbours are not all.
    """
    generator = torch.Generator().manual_seed(0)
    signs = [torch.rand(x.shape, generator=generator) - 0.5 for _ in range(3)]
    return [x.nextafter(sign * torch.inf) for sign in signs]


def assert_compute(f: Callable, t: QuantTensor, store: Store, run: Callable) -> None:
    """Assert that f of the packed tensor is f of the decoded one, within rounding."""
    exact = f(torch.from_numpy(store.exact), partial(normal, torch.float64, "cpu")).numpy()
    dense = partial(normal, torch.float32, "cpu")
    decoded = tensor_of(store).dequantize().cpu()
    naive = [f(x, dense) for x in (store.naive, decoded, *one_unit_off(decoded))]
    with run():
        actual = f(t, partial(normal, torch.float32, t.device))
    assert type(actual) is torch.Tensor
    assert_close(actual, naive, exact)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COMPUTE)
def test_products_agree_with_decoding_first(name: str, mode: str, device: torch.device) -> None:
    made, run = MODES[mode]
    store = store_of("per_head", B, H, N, device=device)
    with made():
        t = tensor_of(store)
    assert_compute(COMPUTE[name], t, store, run)


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_of_every_code(variant: str, device: torch.device) -> None:
    store = store_of(variant, B, H, N, device=device)
    for f in COMPUTE.values():
        assert_compute(f, tensor_of(store), store, torch.no_grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BACKENDS)
def test_operators_of_attention_backends(name: str, mode: str, device: torch.device) -> None:
    made, run = MODES[mode]
    store = store_of("per_head", B, H, N, device=device)
    with made():
        t = tensor_of(store)
    q = normal(torch.float32, device, *Q, D)
    with run():
        out, lse, *_ = BACKENDS[name](q, t)
        expected = F.scaled_dot_product_attention(q, t, t, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    logits = q.double().cpu() @ torch.from_numpy(store.exact).mT / D**0.5
    hidden = torch.ones(5, N, dtype=torch.bool).triu(1)
    torch.testing.assert_close(
        lse.double().cpu(), logits.masked_fill(hidden, -torch.inf).logsumexp(-1),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


# ---- compute: dtypes, gradients, errors --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_have_the_dtype_of_the_dense_operand(
    dtype: torch.dtype, device: torch.device
) -> None:
    t = tensor_of(store_of("per_head", B, H, N, device=device), torch.bfloat16)
    dense = partial(normal, dtype, device)
    for name, f in COMPUTE.items():
        if name != "aten.sdpa":  # torch itself wants equal dtypes there
            assert f(t, dense).dtype == dtype


@pytest.mark.parametrize("name", ["linear bias", "@", "packed @", "bmm", "sdpa", "sdpa repeat_kv"])
def test_autocast(name: str, device: torch.device) -> None:
    store = store_of("shared", B, H, N, device=device)
    t, dense = tensor_of(store), partial(normal, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        out = COMPUTE[name](t, dense)
        expected = COMPUTE[name](t.dequantize(), dense)
        assert COMPUTE[name](t, partial(normal, torch.float64, device)).dtype == torch.float64
    assert out.dtype == expected.dtype == torch.bfloat16
    exact = COMPUTE[name](torch.from_numpy(store.exact), partial(normal, torch.float64, "cpu"))
    naive = COMPUTE[name](store.naive.bfloat16(), partial(normal, torch.bfloat16, "cpu"))
    assert_close(out, [naive], exact.numpy())


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_autocast_stays_outside_of_operators(impl: Impl, device: torch.device) -> None:
    t = tensor_of(store_of("shared", B, H, N, device=device))
    q = normal(torch.float32, device, B, H, 5, D)
    rows = Packed(t.packed, t.scales, t.spec, t.shift, t.equalizer)
    expected = attention(q, rows, rows, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        found = attention(q, rows, rows, impl=impl)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["linear", "@", "packed @", "sdpa", "sdpa mask float"])
def test_backward_is_refused(name: str) -> None:
    t = tensor_of(store_of("shared", B, H, N))

    def trainable(*shape: int) -> torch.Tensor:
        return normal(torch.float32, "cpu", *shape).requires_grad_()

    out = COMPUTE[name](t, trainable)
    assert out.requires_grad
    torch.testing.assert_close(out, COMPUTE[name](t, partial(normal, torch.float32, "cpu")))
    with pytest.raises(UnsupportedError, match=r"backward.*dequantize"):
        out.sum().backward()


def test_a_trainable_mask_or_bias() -> None:
    t = tensor_of(store_of("shared", B, H, N))
    q, mask = normal(torch.float32, "cpu", B, H, 5, D), torch.zeros(5, N, requires_grad=True)
    with pytest.raises(UnsupportedError, match="backward"):
        F.scaled_dot_product_attention(q, t, t, attn_mask=mask).sum().backward()
    bias = torch.zeros(N, requires_grad=True)
    F.linear(q, t[0, 0], bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((N,), float(B * H * 5)))


def test_attention_with_all_keys_masked_is_zero(device: torch.device) -> None:
    t = tensor_of(store_of("4_bits", B, H, N, device=device))
    q = normal(torch.float32, device, B, H, 5, D)
    mask = torch.zeros(5, N, dtype=torch.bool, device=device)
    assert torch.equal(F.scaled_dot_product_attention(q, t, t, mask), torch.zeros_like(q))


def test_keys_and_values_of_different_width() -> None:
    keys = make_store(spec_of(D, 4), B, H, N)
    values = make_store(spec_of(40, 3), B, H, N, statistic="per_head")
    q = normal(torch.float32, "cpu", B, H, 5, D)
    out = F.scaled_dot_product_attention(q, tensor_of(keys), tensor_of(values))
    exact = F.scaled_dot_product_attention(
        q.double(), torch.from_numpy(keys.exact), torch.from_numpy(values.exact)
    )
    naive = F.scaled_dot_product_attention(q, keys.naive, values.naive)
    assert_close(out, [naive], exact.numpy())


BAD_SHAPES: dict[str, Callable[[torch.Tensor], Any]] = {
    "matmul": lambda x: torch.ones(5, 7) @ x,
    "linear": lambda x: F.linear(torch.ones(5, 7), x[0, 0]),
    "sdpa heads": lambda x: F.scaled_dot_product_attention(torch.ones(B, 2 * H, 5, D), x, x),
    "sdpa gqa": lambda x: F.scaled_dot_product_attention(
        torch.ones(B, H + 1, 5, D), x, x, enable_gqa=True
    ),
    "sdpa batch": lambda x: F.scaled_dot_product_attention(torch.ones(3, H, 5, D), x, x),
    "sdpa dim": lambda x: F.scaled_dot_product_attention(torch.ones(B, H, 5, 32), x, x),
    "sdpa keys": lambda x: F.scaled_dot_product_attention(torch.ones(B, H, 5, D), x, x[:, :, 1:]),
    "sdpa mask": lambda x: F.scaled_dot_product_attention(
        torch.ones(B, H, 5, D), x, x, torch.ones(5, N + 1)
    ),
    "reshape": lambda x: x.reshape(5, -1, D),
    "split": lambda x: x.split([1, 5], dim=1),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_shapes_that_torch_refuses(name: str) -> None:
    t = tensor_of(store_of("4_bits", B, H, N))
    with pytest.raises(InputError, match=r"got|must add up|cannot|has"):
        BAD_SHAPES[name](t)
    if name != "sdpa keys":  # torch reads beyond the end on CPU
        with pytest.raises((RuntimeError, ValueError)):
            BAD_SHAPES[name](t.dequantize())
