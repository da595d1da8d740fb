"""Cache layers whose packed tokens lie in pages: the same codes as rows, whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quantforge import QuantForgeCache
from quantforge.errors import ConfigError
from quantforge.llm.fidelity import decode_logits
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig
from quantforge.llm.paged import PagedRows
from quantforge.llm.segments import SegmentedTensor
from tests.llm.models import DenseReferenceCache, random_model
from tests.llm.test_cache import assert_same_logits, tokens

SETTINGS: dict[str, Any] = {"sinks": 4, "window": 16, "page_size": 8}


def _states(n: int, seed: int = 0, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, n, 128, generator=generator) for _ in range(2))


def _pair(**settings: Any) -> tuple[QuantForgeLayer, QuantForgeLayer]:
    options = {**SETTINGS, **settings}
    return tuple(
        QuantForgeLayer(CacheConfig(layout=layout, **options)) for layout in ("rows", "pages")
    )


def _assert_same_codes(rows: QuantForgeLayer, pages: QuantForgeLayer) -> None:
    assert rows.get_seq_length() == pages.get_seq_length()
    for ours, theirs in ((pages.keys, rows.keys), (pages.values, rows.values)):
        assert isinstance(ours, SegmentedTensor)
        assert isinstance(ours.source, PagedRows)
        assert torch.equal(ours.dense, theirs.dense)
        assert torch.equal(ours.packed.packed, theirs.packed.packed)
        assert torch.equal(ours.packed.scales, theirs.packed.scales)


@pytest.mark.parametrize("bits", [4, 3, 2, (4, 2)])
def test_pages_hold_the_codes_of_rows(bits: Any) -> None:
    """Pages fill 8 tokens at a time, are cropped inside, selected, repeated, and filled again."""
    pair = _pair(bits=bits)

    def both(do: Any) -> None:
        for layer in pair:
            do(layer)
        _assert_same_codes(*pair)

    both(lambda layer: layer.update(*_states(100)))
    for step in range(3):
        both(lambda layer, step=step: layer.update(*_states(37, seed=step + 1)))
    both(lambda layer: layer.crop(-60))  # into the middle of a page
    both(lambda layer: layer.update(*_states(90, seed=7)))
    both(lambda layer: layer.batch_select_indices(torch.tensor([1, 0, 1])))
    both(lambda layer: layer.batch_repeat_interleave(2))
    both(lambda layer: layer.update(*_states(30, seed=8, batch=6)))


@pytest.mark.parametrize("length", [1, 5])
def test_attention_over_pages_is_attention_over_rows(length: int) -> None:
    rows, pages = _pair()
    for layer in (rows, pages):
        layer.update(*_states(150))
    new, query = _states(length, seed=3), torch.randn(2, 8, length, 128)
    mask = torch.rand(2, 1, length, 150 + length) < 0.8
    outputs = []
    for layer in (rows, pages):
        key, value = layer.update(*new)
        outputs.append(F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True))
        layer.crop(-length)
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-5, rtol=1e-4)


def test_room_that_was_never_written_does_not_matter() -> None:
    _, pages = _pair(page_size=64)
    pages.update(*_states(150))
    pages.update(*_states(120))
    new, query = _states(1, seed=3), torch.randn(2, 8, 1, 128)
    outputs = []
    for _ in range(2):
        outputs.append(F.scaled_dot_product_attention(query, *pages.update(*new), enable_gqa=True))
        pages.crop(-1)
        for store in (pages._keys, pages._values):
            used = -(-store.n_packed // store.pages.layout.tokens)
            assert store.packed.shape[1] > used, "there is no room"
            store.packed[:, used:] = 0xFF  # scales of NaN
    assert torch.equal(*outputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_agrees_with_the_dense_reference(attention: str) -> None:
    torch.manual_seed(0)
    model = random_model("llama", attention, head_dim=64)
    ids = tokens(2, 110)
    ours = QuantForgeCache(layout="pages", **SETTINGS)
    reference = DenseReferenceCache(layout="rows", **SETTINGS)
    assert_same_logits(
        decode_logits(model, ids, 70, ours), decode_logits(model, ids, 70, reference)
    )
    assert isinstance(ours.layers[0].keys.source, PagedRows)


def test_bytes_are_those_of_the_buffers() -> None:
    _, pages = _pair()
    pages.update(*_states(400))
    pages.update(*_states(1))
    key = pages.keys
    assert key.source.nbytes_packed <= key.source.pages.numel() + 2 * 4 * 2 * 2 * 128
    assert pages.nbytes < 2 * 2 * 2 * 401 * 128 * 4 / 3


def test_codes_without_pages_are_refused() -> None:
    layer = QuantForgeLayer(CacheConfig(layout="pages", bits=5))
    with pytest.raises(ConfigError, match="5 bits"):
        layer.update(*_states(20))
    with pytest.raises(ConfigError, match="layout must be one of"):
        CacheConfig(layout="columns")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("codebook", ["lloyd_max", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_on_cuda_uses_the_fused_kernel(dtype: Any, codebook: Any, bits: int) -> None:
    """Teacher-forced decoding with padding, against the same codes decoded densely."""
    model = random_model("llama", "sdpa", head_dim=128).to("cuda", dtype)
    ids = tokens(2, 330).cuda()
    ours = QuantForgeCache(bits=bits, codebook=codebook, **SETTINGS)
    reference = DenseReferenceCache(bits=bits, codebook=codebook, layout="rows", **SETTINGS)
    got = decode_logits(model, ids, 290, ours)
    want = decode_logits(model, ids, 290, reference)
    assert isinstance(ours.layers[0].keys.source, PagedRows)
    divergence = (want.exp() * (want - got)).sum(-1)
    assert divergence.median() < 2e-3
