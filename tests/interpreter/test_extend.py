"""The kernels of `decode_attention.extend` on the CPU, by Triton's interpreter.

torch's dense kernels for GPUs are replaced by the formula.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantforge.spec import QuantSpec
from tests.helpers import to_float64
from tests.interpreter import INTERPRET
from tests.ops.test_decode_attention import Built, Case

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")


def _attend(query: Any, key: Any, value: Any, scale: float, is_causal: bool = False) -> Any:
    """Attention with its log-sum-exp in float64; causal: the last query sees the last key."""
    repeats = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(repeats, 1) for x in (key, value))
    logits = scale * query.double() @ k.mT
    if is_causal:
        positions = k.shape[2] - query.shape[2]
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(positions)
        logits = logits.masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v).float(), logits.logsumexp(-1).float()


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantforge.ops import flash

    monkeypatch.setattr(flash, "flash", _attend)
    monkeypatch.setattr(flash, "attend", _attend)
    monkeypatch.setattr(flash, "longest_chunk", lambda *sizes: 128)


CASES = {
    "4 bits": {},
    "2 bits": {"k": QuantSpec(128, 2), "v": QuantSpec(128, 2)},
    "3 and 4 bits": {"k": QuantSpec(128, 3), "v": QuantSpec(128, 4)},
    "4 and 3 bits": {"k": QuantSpec(128, 4, codebook="e4m3"), "v": QuantSpec(128, 3)},
    "dim 64": {"k": QuantSpec(64, 4), "v": QuantSpec(64, 4), "statistic": "shared"},
    "four chunks": {"tokens": 390, "statistic": "per_head", "batch": 2},
    "three chunks, pages anywhere": {"tokens": 384, "paged": True},
    "nothing dense": {"dense": 0, "sinks": 0, "is_causal": False},
    "not causal": {"is_causal": False},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poison", "dense")
def test_extend(name: str) -> None:
    from quantforge.ops.decode_attention import extend

    fields: dict[str, Any] = {"batch": 1, "heads": 4, "q_len": 13, "tokens": 200, **CASES[name]}
    case = Case(**fields)
    built = Built(case, "cpu", torch.float32)
    pages, dense = built.pages, built.dense
    out, lse = extend.extend_attention(
        built.query, pages.keys, pages.values, pages.page_table, pages.n_tokens,
        None if dense is None else dense.keys, None if dense is None else dense.values,
        0 if dense is None else dense.n_dense, case.is_causal,
        pages.key_shift, pages.key_equalizer, pages.value_shift, pages.value_equalizer,
        case.k.dim**-0.5, case.k.key, case.v.key,
    )  # fmt: skip
    want, want_lse = built.exact()
    error = np.linalg.norm(to_float64(out) - want) / np.linalg.norm(want)
    assert error < 2e-6, f"relative error {error:.2g}"
    np.testing.assert_allclose(to_float64(lse), want_lse, atol=1e-5)
