"""What a `QuantTensor` must refuse, by name and with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_operator
from torch.nn.attention.flex_attention import flex_attention

from quantforge import QuantForgeConfig, QuantTensor, UnsupportedError
from tests.test_tensor_compute import MASK
from tests.test_tensor_views import (
    MODES,
    B,
    D,
    H,
    N,
    aten,
    repeat_kv,
    store_of,
    tensor_of,
)

# ---- what must be refused: (operation, word in the message) -----------------------------------

REFUSED: dict[str, tuple[Callable[[QuantTensor], Any], str]] = {
    "add": (lambda x: x + 1, "add"),
    "radd": (lambda x: torch.ones(()) + x, "add"),
    "neg": (lambda x: -x, "neg"),
    "eq": (lambda x: x == x, "eq"),
    "mul_": (lambda x: x.mul_(2), "mul_"),
    "imul": (lambda x: x.__imul__(2), "mul_"),
    "zero_": (lambda x: x.zero_(), "zero_"),
    "fill_": (lambda x: x.fill_(1), "fill_"),
    "setitem number": (lambda x: x.__setitem__(0, 0.0), "fill_"),
    "sum": (lambda x: x.sum(), "sum"),
    "mean": (lambda x: x.mean(-1), "mean"),
    "norm": (lambda x: torch.linalg.vector_norm(x), "norm"),
    "exp": (lambda x: x.exp(), "exp"),
    "softmax": (lambda x: x.softmax(-1), "softmax"),
    "sort": (lambda x: x.sort(), "sort"),
    "topk": (lambda x: x.topk(2), "topk"),
    "argmax": (lambda x: x.argmax(), "argmax"),
    "gather": (lambda x: x.gather(2, torch.zeros(1, 1, 1, 1, dtype=torch.long)), "gather"),
    "masked_fill": (lambda x: x.masked_fill(MASK[0, :1], 0), "masked_fill"),
    "where": (lambda x: torch.where(MASK[0, :1], x, x), "where"),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 1)), "pad"),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[-1:]), "layer_norm"),
    "isnan": (lambda x: torch.isnan(x), "ne"),
    "item": (lambda x: x[0, 0, 0].item(), "item"),
    "bool": (lambda x: bool(x), "bool"),
    "in": (lambda x: 1.0 in x, "eq"),
    "tolist": (lambda x: x.tolist(), "tolist"),
    "numpy": (lambda x: x.numpy(), "numpy"),
    "np.asarray": (lambda x: np.asarray(x), "__array__"),
    "zeros_like": (lambda x: torch.zeros_like(x), "_like"),
    "empty_like": (lambda x: torch.empty_like(x), "empty_like"),
    "channel slice": (lambda x: x[..., :3], "slicing"),
    "channel select": (lambda x: x[..., 3], "select"),
    "channel index": (lambda x: x[..., [3, 4]], "indexing"),
    "channel index_select": (lambda x: x.index_select(3, torch.tensor([1])), "index_select"),
    "channel flip": (lambda x: x.flip(-1), "flip"),
    "channel unbind": (lambda x: list(x[0, 0, 0]), "unbind"),
    "channel split": (lambda x: x.chunk(2, dim=-1), "slicing"),
    "channel cat": (lambda x: torch.cat([x, x], dim=-1), "cat"),
    "channel slice transposed": (lambda x: x.mT[..., :3, :], "slicing"),
    "channel expand": (lambda x: x.expand(B, H, N, 2 * D), "expand"),
    "channel repeat": (lambda x: x.repeat(1, 1, 1, 2), "repeat"),
    "channel repeat_interleave": (lambda x: x.repeat_interleave(2, dim=-1), "repeat_interleave"),
    "channel reshape": (lambda x: x.reshape(B, H, -1), "reshape"),
    "channel flatten": (lambda x: x.flatten(2, 3), "reshape"),
    "flatten to scalars": (lambda x: x[0, 0, 0].reshape(2, -1), "reshape"),
    "channel permute": (lambda x: x.permute(3, 0, 1, 2), "permute"),
    "channel unsqueeze": (lambda x: x.unsqueeze(-1), "unsqueeze"),
    "transposed unsqueeze": (lambda x: x.mT.unsqueeze(-2), "unsqueeze"),
    "transposed reshape": (lambda x: x.mT.reshape(B, H, D * 2, -1), "reshape"),
    "transposed index": (lambda x: x.mT[torch.tensor([0]), torch.tensor([0])], "index"),
    "repeat_interleave flat": (lambda x: x.repeat_interleave(2), "repeat_interleave"),
    "cat specs": (lambda x: torch.cat([x, recoded(x)]), "cat"),
    "cat dense": (lambda x: torch.cat([x, x.dequantize()]), "cat"),
    "cat shifts": (lambda x: torch.cat([x, shifted(x)], dim=2), "cat"),
    "cat shifts of heads": (lambda x: torch.cat([x, shifted(x)], dim=1), "cat"),
    "stack dense": (lambda x: torch.stack([x, x.dequantize()]), "stack"),
    "equal dense": (lambda x: torch.equal(x, x.dequantize()), "equal"),
    "copy_ specs": (lambda x: x.copy_(recoded(x)), "copy_"),
    "copy_ shifts": (lambda x: x.copy_(shifted(x)), "copy_"),
    "copy_ repeated": (lambda x: repeat_kv(x, 2).copy_(repeat_kv(x, 2)), "copy_"),
    "setitem repeated": (lambda x: repeat_kv(x, 2).__setitem__(0, x[0]), "__setitem__"),
    "setitem specs": (lambda x: x.__setitem__(0, recoded(x)[0]), "copy_"),
    "index_copy_ specs": (
        lambda x: x.index_copy_(0, torch.tensor([1]), recoded(x)[:1]),
        "index_copy_",
    ),
    "index_copy_ shifts": (
        lambda x: x.index_copy_(0, torch.tensor([1]), shifted(x)[:1]),
        "index_copy_",
    ),
    "index_put_ accumulate": (
        lambda x: x.index_put_((torch.tensor([1]),), x[:1], accumulate=True),
        "index_put_",
    ),
    "index_put_ shifts": (lambda x: x.__setitem__([0], shifted(x)[:1]), "index_put_"),
    "view dtype": (lambda x: x.view(torch.uint8), "view"),
    "aten.view dtype": (lambda x: aten.view.dtype(x, torch.uint8), "view"),
    "to int": (lambda x: x.to(torch.int32), "int32"),
    "complex": (lambda x: x.to(torch.complex64), "complex64"),
    "requires_grad_": (lambda x: x.requires_grad_(True), "requires_grad"),
    "requires_grad =": (lambda x: setattr(x, "requires_grad", True), "requires_grad"),
    "Parameter": (lambda x: nn.Parameter(x), "requires_grad"),
    "matmul of packed": (lambda x: x @ x.mT, "matmul"),
    "baddbmm": (
        lambda x: torch.baddbmm(torch.ones(H, N, N), torch.ones(H, N, D), x[0].mT),
        "baddbmm",
    ),
    "sdpa packed query": (lambda x: F.scaled_dot_product_attention(x, x, x), "attention"),
    "sdpa dense value": (
        lambda x: F.scaled_dot_product_attention(x.dequantize(), x, x.dequantize()),
        "attention",
    ),
    "sdpa dropout": (
        lambda x: F.scaled_dot_product_attention(x.dequantize(), x, x, dropout_p=0.1),
        "dropout",
    ),
    "sdpa transposed": (
        lambda x: F.scaled_dot_product_attention(torch.ones(B, H, 2, N), x.mT, x.mT),
        "attention",
    ),
    "flex_attention": (
        lambda x: flex_attention_operator(x.dequantize(), x, x, None, (), 1.0, {}),
        "flex_attention",
    ),
}


def recoded(x: QuantTensor) -> QuantTensor:
    return QuantTensor.quantize(x.dequantize(), QuantForgeConfig(bits=2))


def shifted(x: QuantTensor) -> QuantTensor:
    shift = torch.ones(x.shape[-1])
    return QuantTensor.quantize(x.dequantize(), x.spec, shift=shift)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, mode: str) -> None:
    made, run = MODES[mode]
    f, word = REFUSED[name]
    with made():
        t = tensor_of(store_of("4_bits", B, H, N))
    before = t.packed.clone()
    with run(), pytest.raises(UnsupportedError, match=word) as caught:
        f(t)
    remedy = ("dequantize", "use ", "write", "see docs", "index ", "keep", "leave", "set ", "undo",
              "would flatten", "must stay")  # fmt: skip
    assert any(hint in str(caught.value) for hint in remedy), str(caught.value)
    assert torch.equal(t.packed, before)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_names_what_to_use() -> None:
    t = tensor_of(store_of("4_bits", B, H, N))
    with pytest.raises(RuntimeError, match="use scaled_dot_product_attention"):
        flex_attention(t.dequantize(), t, t)  # torch compiles even here, and wraps our error
