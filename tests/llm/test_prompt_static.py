"""Caches with fixed buffers in files, and files of caches that grow in fixed buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantforge import QuantForgeCache
from quantforge.errors import ConfigError, FormatError, UnsupportedError
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.static import QuantForgeStaticLayer
from tests.llm.models import random_model
from tests.llm.test_cache import assert_same_logits
from tests.llm.test_prompt_cache import IDS, PROMPT, assert_same, continued, filled, rows_of

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS: dict[str, dict[str, Any]] = {
    "rows": {},
    "pages": {"layout": "pages", "page_size": 64, "sinks": 2, "window": 4},
    "keys and values": {"bits": (4, 2), "shift": False},
    "codes alone": {"sinks": 0, "window": 0, "page_size": 1, "equalizer": False},
    "a layer": {"layers": {1: {"bits": 8, "window": 32}}},
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_model("llama", head_dim=64)


def kind_of(cache: QuantForgeCache) -> type:
    (kind,) = {type(layer) for layer in cache.layers}
    return kind


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
class TestRoundTrips:
    def test_static(self, llama: Any, settings: dict[str, Any], tmp_path: Path) -> None:
        cache = filled(llama, max_cache_len=200, **settings)
        nbytes = cache.nbytes
        cache.save(tmp_path / "a.safetensors", model=llama)
        assert cache.nbytes == nbytes, "nothing is left behind"
        loaded = QuantForgeCache.load(tmp_path / "a.safetensors", model=llama)
        assert kind_of(loaded) is QuantForgeStaticLayer
        assert loaded.is_compileable
        assert [layer.max_cache_len for layer in loaded.layers] == [200, 200]
        assert loaded.nbytes == nbytes
        assert loaded.get_seq_length() == PROMPT
        assert torch.equal(continued(llama, loaded, 80), continued(llama, cache, 80))

    def test_growing_to_static(self, llama: Any, settings: dict[str, Any], tmp_path: Path) -> None:
        cache = filled(llama, **settings)
        cache.save(tmp_path / "a.safetensors")
        static = QuantForgeCache.load(tmp_path / "a.safetensors", max_cache_len=160)
        assert kind_of(static) is QuantForgeStaticLayer
        assert static.get_seq_length() == PROMPT
        assert_same_logits(
            continued(llama, static).log_softmax(-1), continued(llama, cache).log_softmax(-1)
        )
        static.save(tmp_path / "b.safetensors")
        back = QuantForgeCache.load(tmp_path / "b.safetensors", max_cache_len=None)
        assert kind_of(back) is QuantForgeLayer
        for ours, theirs in zip(rows_of(back), rows_of(cache), strict=True):
            n = min(ours.shape[2], theirs.shape[2])
            assert n
            # what the model computes behind the prompt differs in its last bits
            prompt = min(n, PROMPT - 40)
            assert torch.equal(ours[:, :, :prompt], theirs[:, :, :prompt])

    def test_static_to_growing(self, llama: Any, settings: dict[str, Any], tmp_path: Path) -> None:
        filled(llama, max_cache_len=200, **settings).save(tmp_path / "a.safetensors")
        grown = QuantForgeCache.load(tmp_path / "a.safetensors", max_cache_len=None)
        assert kind_of(grown) is QuantForgeLayer
        grown.save(tmp_path / "b.safetensors")
        again = QuantForgeCache.load(tmp_path / "b.safetensors")
        assert_same(again, grown)
        static = QuantForgeCache.load(tmp_path / "b.safetensors", max_cache_len=300)
        assert_same_logits(
            continued(llama, static).log_softmax(-1), continued(llama, grown).log_softmax(-1)
        )


def test_tokens_without_any_dense_rows(llama: Any, tmp_path: Path) -> None:
    cache = filled(llama, max_cache_len=200, sinks=0, window=0, page_size=1, equalizer=False)
    cache.crop(-PROMPT // 2)
    cache.save(tmp_path / "a.safetensors")
    loaded = QuantForgeCache.load(tmp_path / "a.safetensors")
    assert loaded.get_seq_length() == PROMPT // 2
    assert torch.equal(continued(llama, loaded), continued(llama, cache))


def test_empty(llama: Any, tmp_path: Path) -> None:
    cache = QuantForgeCache(llama.config, max_cache_len=50)
    cache.save(tmp_path / "a.safetensors")
    loaded = QuantForgeCache.load(tmp_path / "a.safetensors")
    with torch.no_grad():
        llama(IDS[:, :20], past_key_values=loaded)
    loaded.reset()
    loaded.save(tmp_path / "a.safetensors")
    assert QuantForgeCache.load(tmp_path / "a.safetensors").get_seq_length() == 0


def test_what_has_no_room_or_no_buffers_is_refused(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    filled(llama).save(path)
    with pytest.raises(FormatError, match=r"layers\.0: keys has 70 tokens, .* greater one"):
        QuantForgeCache.load(path, max_cache_len=69)
    assert QuantForgeCache.load(path, max_cache_len=70).get_seq_length() == PROMPT
    filled(llama, layout="pages").save(path)
    with pytest.raises(FormatError, match=r'48 packed rows, .* layout="rows"'):
        QuantForgeCache.load(path, max_cache_len=100)
    rows = QuantForgeCache.load(path, max_cache_len=100, layout="rows")
    assert rows.get_seq_length() == PROMPT
    filled(random_model("mistral", sliding_window=48)).save(path)
    with pytest.raises(UnsupportedError, match="layer 0 is 'sliding'"):
        QuantForgeCache.load(path, max_cache_len=100)
    filled(llama, bits=2, importance=(4, 8), budget=3.6).save(path)
    with pytest.raises(ConfigError, match="max_cache_len"):
        QuantForgeCache.load(path, max_cache_len=100)


@pytest.mark.parametrize("name", ["cache_v1", "cache_v1_static"])
def test_golden_files_load_for_ever(name: str) -> None:
    path = GOLDEN / f"{name}.safetensors"
    cache = QuantForgeCache.load(path, max_cache_len=None)
    prefix = "static." if name.endswith("static") else ""
    with np.load(GOLDEN / "cache_v1.npz") as values:
        expected = [key for key in values if key.startswith("static.") == bool(prefix)]
        assert len(expected) == 2 * len(cache.layers) == (2 if prefix else 18)
        for i, layer in enumerate(cache.layers):
            for part in ("keys", "values"):
                want, t = values[f"{prefix}{i}.{part}"], getattr(layer, part)
                t = t if type(t) is torch.Tensor else t.dequantize()
                got = t[:, :, : want.shape[2]].numpy()
                assert np.abs(got - want).max() <= 2**-21 * np.abs(want).max(), (i, part)
    cache = QuantForgeCache.load(path)
    assert (kind_of(cache) is QuantForgeStaticLayer) if prefix else len(cache.layers) == 9
    for i, layer in enumerate(cache.layers):  # and they go on
        n, dims = layer.get_seq_length(), (32, 8) if i == 6 else (16, 16)
        key, value = (torch.ones(1, 1 if i == 6 else 2, 20, dim) for dim in dims)
        cache.update(key, value, i)
        assert layer.get_seq_length() == n + 20
