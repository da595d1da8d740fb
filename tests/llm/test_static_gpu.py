"""The static cache on a GPU: pages, CUDA graphs, and `generate()` that compiles by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from quantforge.llm import QuantForgeCache
from quantforge.llm.options import CacheConfig
from quantforge.llm.static import QuantForgeStaticLayer
from quantforge.llm.static_sliding import QuantForgeStaticSlidingLayer
from tests.llm.models import random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # torch captures one first
]
STEPS = 230
"""Three pages of 64 tokens and a part of a fourth."""


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model() -> Any:
    """Return a model whose heads have the dims of the fused kernel."""
    made = random_model("llama", head_dim=128, max_position_embeddings=2048)
    return made.to("cuda", torch.bfloat16)


def attend(
    layer: QuantForgeStaticLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    k, v = layer.update(key, value)
    return F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("bits", [4, 3, (4, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [None, 300])
def test_a_replayed_step_is_the_eager_step(bits: Any, masked: bool, window: int | None) -> None:
    """One graph appends, packs and attends for as long as there is room, bit for bit."""
    options, batch = CacheConfig(bits=bits), 3
    layers = [
        QuantForgeStaticLayer(options, 1024)
        if window is None
        else QuantForgeStaticSlidingLayer(options, 1024, window)
        for _ in range(2)
    ]
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16()

    prompt = normal(2, batch, 2, 333, 128)
    for layer in layers:
        layer.update(*prompt)
        assert layer.keys is not None
        assert layer.keys.is_paged
    replayed = torch.compile(attend, mode="reduce-overhead", fullgraph=True)
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 1, layers[0].capacity, device="cuda") > 0.3
    for _ in range(STEPS):
        query, (key, value) = normal(batch, 8, 1, 128), normal(2, batch, 2, 1, 128)
        torch.compiler.cudagraph_mark_step_begin()
        got = replayed(layers[0], query, key, value, mask)
        assert torch.equal(got, attend(layers[1], query, key, value, mask))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["inductor"]["cudagraph_skips"]
    assert int(layers[0].get_seq_length()) == 333 + STEPS
    for a, b in zip(layers[0]._window, layers[1]._window, strict=True):
        assert torch.equal(a, b)


def test_holds_what_the_dynamic_cache_holds(model: Any) -> None:
    """Teacher-forced, past three pages: the same codes, so nearly the same logits."""
    ids = torch.randint(1, 128, (2, 400 + STEPS), device="cuda")
    caches = [QuantForgeCache(model.config, max_cache_len=700), QuantForgeCache(model.config)]
    logits = []
    for cache in caches:
        model(ids[:, :400], past_key_values=cache)
        steps = [
            model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(400, 400 + STEPS)
        ]
        logits.append(torch.cat(steps, 1).float())
    error = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert float(error) < 0.02


def test_generate_compiles_by_itself(model: Any) -> None:
    """With left padding; a second cache and a reset one are served by the same graphs."""
    ids, mask = torch.randint(1, 128, (2, 200), device="cuda"), torch.ones(2, 200, device="cuda")
    mask[0, :50] = 0
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    options = {"do_sample": False, "max_new_tokens": 120, "output_logits": True}
    options |= {"return_dict_in_generate": True}

    def run(cache: QuantForgeCache, **more: Any) -> Any:
        return model.generate(**inputs, past_key_values=cache, **options, **more)

    cache = QuantForgeCache(model.config, max_cache_len=512)
    first = run(cache)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["inductor"]["cudagraph_skips"]
    cache.reset()
    assert torch.equal(run(cache).sequences, first.sequences)
    again = run(QuantForgeCache(model.config, max_cache_len=512))
    assert torch.equal(again.sequences, first.sequences)
    assert counters["stats"]["unique_graphs"] == 1
    eager = run(QuantForgeCache(model.config, max_cache_len=512), disable_compile=True)
    # until rounding lets the texts part
    same = (first.sequences[:, 200:] == eager.sequences[:, 200:]).long().cumprod(1).sum(1)
    for row, n in enumerate(same.tolist()):
        a, b = (torch.stack(out.logits, 1)[row, : max(n, 1)].float() for out in (first, eager))
        assert float((a - b).norm() / b.norm()) < 0.03
