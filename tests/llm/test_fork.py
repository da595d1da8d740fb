"""Forks of a cache hold one prefix together, whatever each of them does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quantforge import QuantForgeCache
from quantforge.llm.attention import quantforge_attention
from quantforge.llm.joined import JoinedRows, parts_of
from quantforge.llm.segments import SegmentedTensor
from tests.helpers import assert_close
from tests.llm.models import SETTINGS, random_model
from tests.llm.test_cache import assert_same_logits
from tests.llm.test_prompt_cache import CACHES, IDS, TIERS, assert_same, filled, memory_of, rows_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "rows": {"layout": "rows"},
    "pages": {"layout": "pages"},
    "whole pages": {"layout": "pages", "page_size": 64},
    "values": {"layout": "pages", "bits": (4, 2)},
    "tiers": {**TIERS, "layout": "rows"},
    "tiers in pages": {**TIERS, "layout": "pages"},
    "heads": {"layout": "rows", "bits": 3, "head_bits": {1: (8, 2)}},
    "heads in pages": {"layout": "pages", "bits": 4, "head_bits": {1: 2}},
}


def states(n: int, seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(batch, 2, n, 128, generator=generator) for _ in range(2))
    return key, value


def attended(cache: QuantForgeCache) -> tuple[SegmentedTensor, SegmentedTensor]:
    key, value = cache.layers[0].keys, cache.layers[0].values
    assert isinstance(key, SegmentedTensor)
    assert isinstance(value, SegmentedTensor)
    return key, value


def exactly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, softcap: float = 0.0
) -> torch.Tensor:
    """Return attention in the dtype of its operands, written out."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    logits = query @ key.mT * query.shape[-1] ** -0.5
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    if mask is not None:
        fits = mask.dtype == torch.bool
        logits = logits.masked_fill(~mask, -torch.inf) if fits else logits + mask.to(logits.dtype)
    return logits.softmax(-1) @ value


def check(got: torch.Tensor, query: torch.Tensor, cache: QuantForgeCache, *args: Any) -> None:
    dense = [x.dequantize() for x in attended(cache)]
    exact = exactly(query.double(), *(x.double() for x in dense), *args).numpy()
    assert_close(got, [exactly(query, *dense, *args)], exact)


class TestTheSame:
    """A fork holds what one cache would hold that was never forked, to the last bit."""

    @pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
    def test_codes(self, settings: dict[str, Any]) -> None:
        whole, forked = (QuantForgeCache(**(SETTINGS | settings)) for _ in range(2))

        def both(do: Callable[[QuantForgeCache], Any]) -> None:
            do(whole)
            do(forked)
            assert_same(whole, forked)

        both(lambda cache: cache.update(*states(150, 0), 0))
        for seed in range(1, 4):
            forked = forked.fork()
            both(lambda cache, seed=seed: cache.update(*states(45, seed), 0))
        assert isinstance(attended(forked)[0].source, JoinedRows)
        both(lambda cache: cache.crop(-30))  # into what the fork has packed itself
        both(lambda cache: cache.update(*states(20, 5), 0))
        both(lambda cache: cache.crop(-130))  # into the first prefix
        both(lambda cache: cache.update(*states(60, 6), 0))
        both(lambda cache: cache.reorder_cache(torch.tensor([1, 0])))
        both(lambda cache: cache.batch_select_indices(torch.tensor([1])))
        both(lambda cache: cache.batch_repeat_interleave(3))
        both(lambda cache: cache.update(*states(40, 7, batch=3), 0))

    @pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
    def test_files(self, settings: dict[str, Any], tmp_path: Any) -> None:
        cache = QuantForgeCache(**(SETTINGS | settings))
        cache.update(*states(150, 0), 0)
        fork = cache.fork()
        fork.update(*states(45, 1), 0)
        fork.save(tmp_path / "a.safetensors")
        loaded = QuantForgeCache.load(tmp_path / "a.safetensors")
        assert_same(loaded, fork)
        again = loaded.fork()
        for one in (fork, again):
            one.update(*states(45, 2), 0)
        assert_same(again, fork)

    @pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
    @pytest.mark.parametrize("length", [1, 5])
    @pytest.mark.parametrize("kind", ["none", "bool", "float", "eager"])
    def test_attention(self, settings: dict[str, Any], length: int, kind: str) -> None:
        cache = QuantForgeCache(**(SETTINGS | settings))
        cache.update(*states(150, 0), 0)
        fork = cache.fork()
        fork.update(*states(65, 1), 0)
        key, value = attended(fork)
        assert isinstance(key.source, JoinedRows)
        generator = torch.Generator().manual_seed(9)
        query = torch.randn(2, 4, length, 128, generator=generator)
        mask: torch.Tensor | None = torch.rand(2, 1, length, 215, generator=generator) < 0.7
        if kind == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        elif kind != "bool":
            mask = None
        if kind == "eager":
            weights = query.flatten(1, 2).unflatten(1, (2, -1)) @ key.transpose(2, 3)
            got = (weights * 128**-0.5).softmax(-1) @ value
            got = got.flatten(1, 2).unflatten(1, (4, -1))
        else:
            got = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        check(got, query, fork, mask)

    @pytest.mark.parametrize("layout", ["rows", "pages"])
    @pytest.mark.parametrize("window", [None, 30, 100])
    @pytest.mark.parametrize("masked", [False, True])
    def test_caps_and_windows(self, layout: str, window: int | None, masked: bool) -> None:
        cache = QuantForgeCache(layout=layout, **SETTINGS)
        cache.update(*states(150, 0), 0)
        fork = cache.fork()
        fork.update(*states(65, 1), 0)
        query = torch.randn(2, 4, 1, 128, generator=torch.Generator().manual_seed(9))
        seen = torch.ones(2, 1, 1, 215, dtype=torch.bool)
        seen[0, ..., :50] = not masked
        if masked and window is not None:  # a mask says so too, as transformers makes it
            seen[..., : 215 - window] = False
        out, _ = quantforge_attention(
            SimpleNamespace(is_causal=True),
            query,
            *attended(fork),
            seen if masked else None,
            softcap=5.0,
            sliding_window=window,
        )
        if window is not None:
            seen[..., : 215 - window] = False
        check(out.transpose(1, 2), query, fork, seen, 5.0)


def test_forks_of_forks_have_few_parts() -> None:
    whole = QuantForgeCache(layout="pages", **SETTINGS)
    whole.update(*states(300, 0), 0)
    cache = whole.fork()
    first = cache.layers[0]._keys.prefix[0]
    for seed in range(1, 25):
        cache = cache.fork()
        for one in (cache, whole):
            one.update(*states(8, seed), 0)
        parts = parts_of(attended(cache)[0].source)
        assert len(parts) <= 7, "one, its binary digits, and the rows since the last fork"
        assert cache.layers[0]._keys.prefix[0] is first or seed > 20
    assert_same(cache, whole)


class TestBytes:
    """What forks cost."""

    @pytest.mark.parametrize("layout", ["rows", "pages"])
    @pytest.mark.parametrize("loaded", [False, True])
    def test_windows_and_own_pages(self, layout: str, loaded: bool, tmp_path: Any) -> None:
        x = torch.randn(1, 4, 16 + 128 + 123 * 64, 64)  # sinks, window and whole pages
        cache = QuantForgeCache(layout=layout)
        cache.update(x, x, 0)
        if loaded:
            cache.save(tmp_path / "a.safetensors")
            cache = QuantForgeCache.load(tmp_path / "a.safetensors")
        alone = memory_of(cache)
        page = 64 * 4 * (32 + 2)  # tokens, heads, codes and a scale
        forks = [cache.fork() for _ in range(10)]
        for _ in range(5):
            for fork in forks:
                fork.update(x[:, :, :64], x[:, :, :64], 0)
        stores = [store for fork in forks for store in fork.layers[0]._stores()]
        assert all(store.n_packed == 128 * 64 for store in stores)
        windows = sum(store.dense.nbytes for store in stores)
        own = sum(t.nbytes for s in stores for t in (s.packed, s.scales) if t is not None)
        assert memory_of(cache, *forks) == alone + windows + own
        assert 5 * page * len(stores) <= own <= 13 * page * len(stores), "pages, and room for eight"
        assert own < 0.12 * len(forks) * alone
        for fork in forks[1:]:
            fork.update(x[:, :, :64], x[:, :, :64], 0)
        assert memory_of(cache) == alone
        assert forks[0].nbytes >= memory_of(forks[0])

    def test_sliding_windows_share_until_they_pack(self) -> None:
        model = random_model("mistral", sliding_window=48)
        cache = filled(model)
        alone, before = memory_of(cache), [t.clone() for t in rows_of(cache)]
        fork = cache.fork()
        windows = sum(s.dense.untyped_storage().nbytes() for x in fork.layers for s in x._stores())
        assert memory_of(cache, fork) == alone + windows
        with torch.no_grad():
            model(IDS[:, :20], past_key_values=fork)
        assert memory_of(cache, fork) > alone + windows
        assert all(torch.equal(a, b) for a, b in zip(rows_of(cache), before, strict=True))


class TestModels:
    """Continuations of one prompt by a model."""

    @staticmethod
    def continued(model: Any, cache: Any, ids: torch.Tensor = IDS[:, :40]) -> torch.Tensor:
        with torch.no_grad():
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40)]
        return torch.cat(steps, 1).log_softmax(-1)

    @pytest.mark.parametrize("settings", CACHES.values(), ids=CACHES)
    @pytest.mark.parametrize("fork", [QuantForgeCache.fork, copy.deepcopy], ids=["fork", "copy"])
    def test_continue_on_their_own(self, settings: dict[str, Any], fork: Callable) -> None:
        model = random_model("llama")
        cache, expected = filled(model, **settings), filled(model, **settings)
        one, two = fork(cache), fork(cache)
        with torch.no_grad():
            model(IDS[:, :30], past_key_values=one)
        answer = self.continued(model, expected)
        for other in (two, fork(cache), cache):
            assert_same_logits(self.continued(model, other), answer)

    @pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
    def test_families(self, family: str) -> None:
        attention = "quantforge" if family == "gemma2" else "sdpa"
        model = random_model(family, attention)
        cache = filled(model)
        answer = self.continued(model, copy.deepcopy(cache))
        for other in (cache.fork(), cache.fork(), cache):
            assert_same_logits(self.continued(model, other), answer)

    def test_static_layers_are_copied(self) -> None:
        model = random_model("llama")
        cache = filled(model, max_cache_len=200)
        expected = self.continued(model, cache.fork())
        one = cache.fork()
        with torch.no_grad():
            model(IDS[:, :60], past_key_values=one)
        assert torch.equal(self.continued(model, cache.fork()), expected)

    def test_in_inference_mode(self) -> None:
        model = random_model("llama")
        with torch.inference_mode():
            fork = filled(model).fork()
        self.continued(model, fork)

    @pytest.mark.gpu
    def test_on_the_gpu(self) -> None:
        model = random_model("llama", head_dim=128).to("cuda", torch.bfloat16)
        cache = QuantForgeCache(**SETTINGS)
        ids = IDS.cuda()
        with torch.no_grad():
            model(ids, past_key_values=cache)
        whole, fork = copy.deepcopy(cache), cache.fork()
        answer, got = (self.continued(model, c, ids[:, :40]).float() for c in (whole, fork))
        assert isinstance(attended(fork)[0].source, JoinedRows)
        divergence = (answer.exp() * (answer - got)).sum(-1)
        assert divergence.median() < 2e-3
