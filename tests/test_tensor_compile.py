"""`QuantTensor` in `torch.compile(fullgraph=True)` and `torch.export`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from quantforge import QuantForgeConfig, QuantTensor, UnsupportedError
from quantforge.ops import cache_append
from tests.helpers import spec_of
from tests.test_tensor_compute import COMPUTE
from tests.test_tensor_views import (
    ALL_VIEWS,
    ALL_WRITES,
    B,
    D,
    H,
    N,
    assert_view,
    ids_like,
    normal,
    repeat_kv,
    store_of,
    tensor_of,
)

MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
NOT_TRACEABLE = {"deepcopy", "copy.copy", "pickle"}
dense = partial(normal, torch.float32, "cpu")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(f: Callable, backend: Any = "aot_eager", **options: Any) -> Callable:
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    n_rep = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, repeat_kv(k, n_rep), repeat_kv(v, n_rep))


@pytest.mark.parametrize("mode", MODES)
def test_every_view_in_one_graph(mode: str) -> None:
    views = {name: f for name, f in ALL_VIEWS.items() if name not in NOT_TRACEABLE}
    t = tensor_of(store_of("shared", B, H, N))
    with MODES[mode]():
        results = compiled(lambda x: {name: f(x) for name, f in views.items()})(t)
    for name, f in views.items():
        assert_view(results[name], t, f(ids_like(t)))


@pytest.mark.parametrize("mode", MODES)
def test_every_product_in_one_graph(mode: str) -> None:
    t = tensor_of(store_of("per_head", B, H, N))
    operands: dict[tuple[int, ...], torch.Tensor] = {}

    def remember(*shape: int) -> torch.Tensor:
        return operands.setdefault(shape, dense(*shape))

    expected = {name: f(t, remember) for name, f in COMPUTE.items()}

    def run(x: torch.Tensor, known: dict) -> dict[str, torch.Tensor]:
        return {name: f(x, lambda *shape: known[shape]) for name, f in COMPUTE.items()}

    with MODES[mode]():
        results = compiled(run)(t, operands)
    torch.testing.assert_close(results, expected)


INDUCTOR = {
    "linear": lambda x, t: F.linear(x, t[0, 0], x[0, 0, :, 0].new_ones(N)),
    "matmul": lambda x, t: (x @ t.mT).softmax(-1) @ t,
    "attention": lambda x, t: attend(x.repeat(1, 4, 1, 1), t, t) * 2,
    "views": lambda x, t: (t[:, :, 1:4].transpose(0, 1) @ x[0, 0].mT, t[:, :, 2:].dequantize()),
}


@pytest.mark.parametrize("name", INDUCTOR)
def test_inductor(name: str) -> None:
    t, x = tensor_of(store_of("per_head", B, H, N)), dense(B, H, 5, D)
    with torch.no_grad():
        torch.testing.assert_close(compiled(INDUCTOR[name], "inductor")(x, t), INDUCTOR[name](x, t))


@pytest.mark.parametrize("mode", MODES)
def test_quantizing_in_the_graph(mode: str) -> None:
    def f(x: torch.Tensor, shift: torch.Tensor) -> QuantTensor:
        return QuantTensor.quantize(x, QuantForgeConfig(bits=3), shift=shift)[:, 1:]

    x, shift = dense(B, H, N, D), dense(D)
    with MODES[mode]():
        t = compiled(f)(x, shift)
    assert isinstance(t, QuantTensor)
    assert torch.equal(t, f(x, shift))


def test_a_growing_history_compiles_twice() -> None:
    t, q = tensor_of(store_of("per_head", B, H, 64)), dense(B, 4 * H, 1, D)
    counter = CompileCounterWithBackend("aot_eager")
    f = compiled(attend, counter)
    with torch.no_grad():
        for n in range(17, 40):
            torch.testing.assert_close(
                f(q, t[:, :, :n], t[:, :, :n]), attend(q, t[:, :, :n], t[:, :, :n])
            )
    assert counter.frame_count <= 2


def test_a_history_marked_dynamic_compiles_once() -> None:
    t, q = tensor_of(store_of("shared", B, H, 64)), dense(B, 4 * H, 1, D)
    counter = CompileCounterWithBackend("aot_eager")
    f = compiled(attend, counter)
    with torch.no_grad():
        for n in range(17, 24):
            history = t[:, :, :n]
            torch._dynamo.maybe_mark_dynamic(history, 2)
            torch.testing.assert_close(f(q, history, history), attend(q, history, history))
    assert counter.frame_count == 1


def compute_nodes(f: Callable, *args: Any, **options: Any) -> list[str]:
    """Return the names of quantforge's operators in the compiled graph, and of copies."""
    names: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Callable:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        compiled(f, aot_autograd(fw_compiler=record), **options)(*args)
    return [n for n in names if "quantforge" in n or "index" in n or "clone" in n]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("n_rep", [1, 4])
def test_nothing_is_decoded_or_repeated_in_the_graph(n_rep: int, dynamic: bool) -> None:
    t, q = tensor_of(store_of("per_head", B, H, N)), dense(B, n_rep * H, 5, D)
    assert compute_nodes(attend, q, t, t, dynamic=dynamic) == ["quantforge.attention.default"]
    eager = compute_nodes(
        lambda q, k: q @ repeat_kv(k, n_rep).transpose(2, 3) @ repeat_kv(k, n_rep), q, t,
        dynamic=dynamic,
    )  # fmt: skip
    assert eager == ["quantforge.scores.default", "quantforge.combine.default"]


# the public function checks its arguments, and Dynamo traces through their caches: harmless
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_reading_what_the_graph_has_just_written(backend: str) -> None:
    """A cache step: append to the buffers, then build a new tensor over them (pytorch #114415)."""
    spec = spec_of(D)

    def step(
        packed: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, QuantTensor]:
        cache_append(packed, scales, x, position, spec)
        history = QuantTensor(packed, scales, spec)
        return F.scaled_dot_product_attention(x, history, history), history

    start = tensor_of(store_of("4_bits", B, H, N))
    buffers = {"eager": start.clone(), "compiled": start.clone()}
    f = compiled(step, backend)
    for i in range(3):
        x, position = dense(B, H, 1, D, seed=i), torch.tensor(i)
        with torch.no_grad():
            t, u = buffers["eager"], buffers["compiled"]
            expected, result = (g(b.packed, b.scales, x, position) for g, b in ((step, t), (f, u)))
        torch.testing.assert_close(result[0], expected[0])
        assert torch.equal(result[1], expected[1])
        assert torch.equal(t, u)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["packed", "dense"])
@pytest.mark.parametrize("name", ALL_WRITES)
def test_writes_in_the_graph(name: str, source: str, mode: str) -> None:
    # two packed tensors whose shifts are two inputs of the graph cannot be known to agree
    variant = "4_bits" if source == "packed" else "shared"
    t = tensor_of(store_of(variant, B, H, N))
    values = t.flip(2) if source == "packed" else dense(B, H, N, D)

    def write(x: QuantTensor, s: torch.Tensor) -> torch.Tensor:
        ALL_WRITES[name](x, s)
        return x.dequantize()

    expected, target = t.clone(), t.clone()
    write(expected, values)
    with MODES[mode]():
        out = compiled(write)(target, values)
    assert torch.equal(target, expected)
    torch.testing.assert_close(out, expected.dequantize())


def test_training_through_a_compiled_graph_is_refused() -> None:
    t, q = tensor_of(store_of("4_bits", B, H, N)), dense(B, H, 5, D).requires_grad_()
    for f in (lambda q, t: attend(q, t, t).sum(), lambda q, t: (q @ t.mT).sum()):
        out = compiled(f)(q, t)
        torch.testing.assert_close(out, f(q.detach(), t))
        with pytest.raises(UnsupportedError, match=r"backward.*dequantize"):
            out.backward()


def test_unknown_operations_stop_the_compiler() -> None:
    t = tensor_of(store_of("4_bits", B, H, N))
    with torch.no_grad(), pytest.raises(RuntimeError, match="not defined on QuantTensor"):
        compiled(lambda x: x.exp())(t)


class Layer(nn.Module):
    def __init__(self, t: QuantTensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(t, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight).relu()


def test_a_compiled_module() -> None:
    layer = Layer(tensor_of(store_of("shared", N)))
    x = dense(5, D)
    with torch.no_grad():
        torch.testing.assert_close(compiled(copy.deepcopy(layer))(x), layer(x))


def test_export() -> None:
    layer = Layer(tensor_of(store_of("shared", N)))
    x = dense(5, D)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        assert "quantforge.scores" in program.graph_module.code
        torch.testing.assert_close(program.module()(x), layer(x))
