"""`QuantTensor` itself: its parts, its copies in and out, and the table of its operations."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quantforge import InputError, QuantForgeConfig, QuantTensor, UnsupportedError
from quantforge.tensor import FUNCTIONS, OPERATORS, QuantizedTensor
from tests.helpers import make_store, spec_of
from tests.test_tensor_compute import BACKENDS, COMPUTE, Q
from tests.test_tensor_refused import REFUSED, recoded, shifted
from tests.test_tensor_views import (
    ALL_VIEWS,
    ALL_WRITES,
    MODES,
    VARIANTS,
    B,
    D,
    H,
    N,
    aten,
    normal,
    repeat_kv,
    store_of,
    tensor_of,
)

DOC = Path(__file__).parents[1] / "docs" / "tensor.md"


# ---- the tensor itself ----------------------------------------------------------------------


def test_it_looks_like_a_tensor(device: torch.device) -> None:
    t = tensor_of(store_of("shared", B, H, N, device=device), torch.bfloat16)
    assert isinstance(t, torch.Tensor)
    assert QuantizedTensor is QuantTensor
    assert (t.shape, t.ndim, t.size(-1), len(t)) == (torch.Size((B, H, N, D)), 4, D, B)
    assert (t.dtype, t.device.type, t.numel()) == (torch.bfloat16, device.type, B * H * N * D)
    assert t.is_floating_point()
    assert not t.requires_grad
    assert t.nbytes_packed == sum(p.nbytes for p in t._inner().values()) < t.nbytes
    assert [row.shape for row in t[0]] == [torch.Size((N, D))] * H
    assert bool(torch.equal(t, t.clone()))
    assert len({t, t}) == 1
    assert "prod" not in repr(t)


def test_repr_names_the_code() -> None:
    t = tensor_of(store_of("shared", N))
    expected = "QuantTensor(shape=(6, 64), dtype=torch.float32, bits=3, rotation='hadamard'"
    for text in (repr(t), str(t), f"{t}"):
        assert text.startswith(expected)


def test_equal_compares_codes() -> None:
    t = tensor_of(store_of("4_bits", B, H, D))
    assert torch.equal(t, t.clone())
    assert torch.equal(repeat_kv(t, 2), t.repeat_interleave(2, dim=1))
    assert not torch.equal(t, t.mT)
    assert not torch.equal(t, t.flip(0))
    assert not torch.equal(t, t[:1])
    assert not torch.equal(t, shifted(t))
    assert not torch.equal(t, recoded(t))


def test_no_rows(device: torch.device) -> None:
    t = QuantTensor.quantize(torch.zeros(2, 0, D, device=device))
    assert t.shape == (2, 0, D)
    assert t.dequantize().shape == (2, 0, D)
    assert torch.cat([t, t], dim=1).shape == (2, 0, D)
    assert torch.equal(t, t.clone())
    q = torch.ones(2, 3, D, device=device)
    assert torch.equal(F.scaled_dot_product_attention(q, t, t), torch.zeros_like(q))


def test_one_vector() -> None:
    x = normal(torch.float32, "cpu", D)
    t = QuantTensor.quantize(x, shift=torch.ones(D))
    assert (t.shape, t.dequantize().shape) == (x.shape, x.shape)
    torch.testing.assert_close(x @ t, x @ t.dequantize())


def test_quantize_keeps_shape_dtype_and_device(device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = normal(dtype, device, 3, 5, D)
        t = QuantTensor.quantize(x, QuantForgeConfig(bits=8))
        assert (t.shape, t.dtype, t.device) == (x.shape, x.dtype, x.device)
        assert (t.dequantize() - x).abs().max() < 0.1
    with pytest.raises(InputError, match="scalar"):
        QuantTensor.quantize(torch.ones(()))


def _parts() -> dict[str, Any]:
    t = tensor_of(store_of("4_bits", N))
    return {"packed": t.packed, "scales": t.scales, "spec": t.spec}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(N, 7, dtype=torch.uint8)}, "rows of 32 bytes"),
        ({"packed": torch.zeros(N, 32)}, "uint8"),
        ({"scales": torch.zeros(N, 1)}, "float16"),
        ({"scales": torch.zeros(N, 2, dtype=torch.float16)}, "shape"),
        ({"spec": QuantForgeConfig()}, "QuantSpec"),
        ({"shift": torch.zeros(3)}, "shift"),
        ({"shift": torch.zeros(N, D)}, "shift"),
        ({"shift": torch.zeros(D, dtype=torch.long)}, "floating"),
        ({"equalizer": torch.ones(2, 1, D)}, "equalizer"),
        ({"shift": torch.zeros(D, device="meta")}, "meta"),
        ({"dtype": torch.int32}, "floating-point"),
    ],
)
def test_the_constructor_checks_its_parts(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantTensor(**(_parts() | change))


# ---- copies in and out -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_copy_to_dense_decodes(mode: str, device: torch.device) -> None:
    made, run = MODES[mode]
    with made():
        t = tensor_of(store_of("per_head", B, H, N, device=device))
    with run():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            out = torch.zeros(B, H, N, D, dtype=dtype, device=device)
            out[:] = t
            assert torch.equal(out, t.dequantize().to(dtype))


def test_dtype_changes_what_a_tensor_stands_for(device: torch.device) -> None:
    t = tensor_of(store_of("shared", B, H, N, device=device))
    half = t.half()
    assert (half.dtype, t.to(torch.bfloat16).dtype) == (torch.float16, torch.bfloat16)
    assert torch.equal(half.packed, t.packed)
    assert torch.equal(half.scales, t.scales)
    assert half.dequantize().dtype == torch.float16
    assert half.dequantize(torch.float32).dtype == torch.float32
    assert t.to(half).dtype == torch.float16
    assert torch.cat([half, t]).dtype == torch.float32
    assert (t.to(t.device) is t, t.cpu().device.type) == (True, "cpu")


@pytest.mark.gpu
def test_moves_between_devices() -> None:
    t = tensor_of(store_of("per_head", B, H, N))
    pinned = t.pin_memory()
    assert pinned.is_pinned()
    moved = pinned.to("cuda", non_blocking=True)
    assert {part.device.type for part in moved._inner().values()} == {"cuda"}
    assert torch.equal(moved.cpu(), t)
    assert t.clone().copy_(moved).equal(t)


def test_share_memory_does_not_crash() -> None:
    t = tensor_of(store_of("shared", N))
    assert not t.is_shared()
    assert t.share_memory_() is t
    assert t.is_shared()
    assert not t.is_pinned()


@pytest.mark.parametrize("variant", VARIANTS)
def test_serialization(variant: str) -> None:
    t = tensor_of(store_of(variant, B, H, N), torch.bfloat16)
    for x in (t, t[:, :, 1:3], repeat_kv(t, 2), t.mT):
        buffer = io.BytesIO()
        torch.save({"x": x}, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)["x"]
        assert torch.equal(loaded, x)
        assert (loaded.shape, loaded.dtype, loaded.spec) == (x.shape, x.dtype, x.spec)
        assert torch.equal(loaded.dequantize(), x.dequantize())


def test_loading_in_a_fresh_process(tmp_path: Path) -> None:
    t = tensor_of(store_of("prod", B, H, N))
    torch.save([t, t.dequantize()], tmp_path / "t.pt")
    program = (
        "import torch, quantforge\n"
        f"t, dense = torch.load({str(tmp_path / 't.pt')!r}, weights_only=True)\n"
        "assert type(t) is quantforge.QuantTensor\n"
        "assert torch.allclose(t.dequantize(), dense, atol=1e-5), 'decodes differently'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


class Frozen(nn.Module):
    def __init__(self, t: QuantTensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(t, requires_grad=False)
        self.register_buffer("rows", t.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + x @ self.rows.mT


def test_modules() -> None:
    t, other = (tensor_of(make_store(spec_of(D), N, statistic="shared", seed=s)) for s in (0, 1))
    module = Frozen(t)
    assert isinstance(module.weight, QuantTensor)
    assert isinstance(module.weight, nn.Parameter)
    x = normal(torch.float32, "cpu", 3, D)
    torch.testing.assert_close(module(x), 2 * x @ t.dequantize().mT, rtol=1e-4, atol=1e-4)
    state = module.state_dict()
    assert {type(value) for value in state.values()} <= {QuantTensor, type(module.weight)}
    twin = Frozen(other.clone())
    assert not torch.equal(twin.weight, t)
    twin.load_state_dict(state)
    assert torch.equal(twin.weight, t)
    assert torch.equal(twin.rows, t)
    assert torch.equal(Frozen(other.clone()).rows, other)
    third = Frozen(other.clone())
    third.load_state_dict(state, assign=True)
    assert torch.equal(third.weight, t)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert (half.weight.dtype, half.rows.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(half.weight.packed, t.packed)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert module.weight.requires_grad is False
    assert sum(p.numel() for p in module.parameters()) == N * D


def test_accelerate_sends_it() -> None:
    from accelerate.utils import send_to_device

    t = tensor_of(store_of("shared", N))
    assert torch.equal(send_to_device({"x": [t]}, "cpu")["x"][0], t)


# ---- the table of operations ------------------------------------------------------------------


def test_the_table_exercises_every_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()

    def recorder(key: Any, handler: Callable) -> Callable:
        def record(*args: Any, **kwargs: Any) -> Any:
            called.add(key)
            return handler(*args, **kwargs)

        return record

    for table in (FUNCTIONS, OPERATORS):
        for key, handler in list(table.items()):
            monkeypatch.setitem(table, key, recorder(key, handler))
    t = tensor_of(store_of("shared", B, H, N))
    dense = partial(normal, torch.float32, "cpu")
    for run in (torch.no_grad, torch.inference_mode):
        with run():
            for view in ALL_VIEWS.values():
                view(t)
            for compute in COMPUTE.values():
                compute(t, dense)
            for backend in BACKENDS.values():
                backend(dense(*Q, D), t)
            for write in ALL_WRITES.values():
                write(t, t.clone())
            for other in OTHERS.values():
                other(t)
    for f, _ in REFUSED.values():
        with pytest.raises(UnsupportedError):
            f(t)
    assert set(FUNCTIONS) | set(OPERATORS) == called


def _pin(x: QuantTensor, f: Callable) -> None:
    if torch.cuda.is_available():
        assert f(x).is_pinned()
    else:
        with pytest.raises(RuntimeError):
            f(x)


OTHERS: dict[str, Callable[[QuantTensor], Any]] = {
    # operations whose result is not a view or a product; each has a test of its own below
    "equal": lambda x: torch.equal(x, x),
    "to": lambda x: x.to(torch.float16),
    "is_pinned": lambda x: x.is_pinned(),
    "pin_memory": lambda x: (
        _pin(x, QuantTensor.pin_memory),
        _pin(x, aten._pin_memory.default),
        _pin(x, aten.pin_memory.default),
    ),
    "share_memory_": lambda x: x.clone().share_memory_(),
    "is_shared": lambda x: x.is_shared(),
    "requires_grad_": lambda x: x.requires_grad_(False),
    "copy_ to dense": lambda x: torch.empty(x.shape).copy_(x),
}


def test_the_documented_table_is_this_table() -> None:
    documented = set()
    for line in DOC.read_text().splitlines():
        if line.startswith("| `"):
            documented |= {cell.strip(" `") for cell in line.split("|")[1].split(",")}
    assert documented, "docs/tensor.md has no table"
    tables = (ALL_VIEWS, COMPUTE, BACKENDS, ALL_WRITES, REFUSED, OTHERS)
    known = {name for table in tables for name in table}
    assert documented - known == set()


# ---- without data ------------------------------------------------------------------------------

DATA_DEPENDENT = {"bool mask", "bool mask 0", "mask of rows", "repeat_interleave tensor"}
NOT_FAKE = {"pickle", "copy.copy", "deepcopy"}


def test_fake_tensors_have_the_real_shapes() -> None:
    t = tensor_of(store_of("shared", B, H, N))
    dense = partial(normal, torch.float32, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(t)
        assert isinstance(fake, QuantTensor)
        fakes = {n: f(fake) for n, f in ALL_VIEWS.items() if n not in DATA_DEPENDENT | NOT_FAKE}
        fakes |= {n: f(fake, dense) for n, f in COMPUTE.items()}
        fakes |= {"dequantize": fake.dequantize(), "to": fake.to(torch.float16)}
    reals = {n: f(t) for n, f in ALL_VIEWS.items() if n in fakes}
    reals |= {n: f(t, dense) for n, f in COMPUTE.items()}
    reals |= {"dequantize": t.dequantize(), "to": t.to(torch.float16)}

    def signature(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            inner = signature(list(x._inner().values())) if isinstance(x, QuantTensor) else None
            return x.shape, x.dtype, isinstance(x, QuantTensor), inner
        return [signature(one) for one in x]

    assert {n: signature(x) for n, x in fakes.items()} == {
        n: signature(x) for n, x in reals.items()
    }
