"""Many queries over pages: decoded chunks through torch's dense kernels, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantforge.ops._library import load_backend
from quantforge.spec import QuantSpec
from tests.ops.test_decode_attention import Built, Case, check

pytestmark = pytest.mark.gpu

MANY: dict[str, Any] = {"heads": 32, "kv_heads": 8, "q_len": 160, "dense": 200, "tokens": 1000}
CASES: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "exact table": {"k": QuantSpec(128, 4, codebook="gaussian")},
    "2 bits": {"k": QuantSpec(128, 2), "v": QuantSpec(128, 2, codebook="e4m3")},
    "3 and 4 bits": {"k": QuantSpec(128, 3, codebook="e4m3"), "v": QuantSpec(128, 4)},
    "dim 64": {"k": QuantSpec(64, 4), "v": QuantSpec(64, 4), "statistic": "shared"},
    "dim 256": {"k": QuantSpec(256, 4), "v": QuantSpec(256, 4)},
    "long": {"tokens": 5000, "batch": 1, "q_len": 300, "dense": 310},
    "three lengths": {"tokens": 7000, "batch": 1, "q_len": 300, "dense": 310},
    "pages anywhere": {"paged": True, "statistic": "per_head"},
    "not causal": {"is_causal": False, "dense": 21},
    "nothing dense": {"dense": 0, "sinks": 0, "is_causal": False},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls that take this way."""
    backend: Any = load_backend("decode_attention", "triton")
    seen: list[int] = []
    extend = backend.extend.extend_attention

    def counted(*arguments: Any) -> Any:
        seen.append(1)
        return extend(*arguments)

    monkeypatch.setattr(backend.extend, "extend_attention", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_chunks(name: str, dtype: torch.dtype, calls: list[int], poison: None) -> None:
    check(Case(**{**MANY, **CASES[name]}), ("cuda", dtype), "triton")
    assert calls


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_chunks_of_any_number(
    chunks: int, calls: list[int], monkeypatch: pytest.MonkeyPatch, poison: None
) -> None:
    backend: Any = load_backend("decode_attention", "triton")
    longest = -(-1216 // (64 * chunks)) * 64
    monkeypatch.setattr(backend.extend.flash, "longest_chunk", lambda *sizes: longest)
    check(Case(**{**MANY, "tokens": 1210, "statistic": "per_head"}), ("cuda", torch.bfloat16))
    assert calls


def test_calls_on_two_streams_share_nothing(poison: None) -> None:
    built = Built(Case(**MANY), "cuda", torch.bfloat16)
    want, want_lse = built.run()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            found.append(built.run())
    torch.cuda.synchronize()
    for out, lse in found:
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("fields", [{"masked": True}, {"window": 70}, {"softcap": 5.0}])
def test_what_hides_tokens_goes_elsewhere(fields: dict[str, Any], calls: list[int]) -> None:
    check(Case(**{**MANY, **fields}), ("cuda", torch.bfloat16), "triton")
    assert not calls


def test_a_captured_call_reads_the_pages_of_its_replay(calls: list[int]) -> None:
    built = Built(Case(**MANY), "cuda", torch.bfloat16)
    built.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = built.run()
    built.pages.keys.copy_(built.pages.keys.flip(0))
    built.pages.values.copy_(built.pages.values.flip(0))
    graph.replay()
    want, want_lse = built.run()
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert len(calls) == 3
