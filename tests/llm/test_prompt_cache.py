"""Caches in files continue the same text; copies share what is packed."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file as save_plain
from transformers import DynamicCache

from quantforge import QuantForgeCache
from quantforge.errors import FormatError, InputError, UnsupportedError
from quantforge.io import read_metadata, save_file
from quantforge.llm import CacheConfig
from quantforge.llm.fingerprint import fingerprint
from quantforge.llm.layer_kinds import KINDS
from quantforge.llm.saved_layers import DERIVED, SAVED
from quantforge.llm.store import Store
from tests.llm.models import SETTINGS, random_model

ROOT = Path(__file__).parents[2]
PROMPT = 70
IDS = torch.randint(2, 128, (2, PROMPT), generator=torch.Generator().manual_seed(1))
TIERS: dict[str, Any] = {"bits": 2, "importance": (4, 8), "budget": 3.6}
CACHES: dict[str, dict[str, Any]] = {
    "default": {},
    "keys and values": {"bits": (4, 2)},
    "codes alone": {"sinks": 0, "window": 0, "page_size": 1, "shift": False, "equalizer": False},
    "layers": {"layers": {1: {"bits": 8, "window": 32}}},
    "3 bits, e4m3": {"bits": 3, "codebook": "e4m3", "seed": 5},
    "tiers": TIERS,
    "heads": {"bits": 3, "head_bits": {1: (8, 2)}},
}


def filled(model: Any, **settings: Any) -> QuantForgeCache:
    """Return a cache that holds the prompt and some decoded tokens."""
    cache = QuantForgeCache(model.config, **(SETTINGS | settings))
    with torch.no_grad():
        model(IDS[:, :50], past_key_values=cache)
        for i in range(50, PROMPT):
            model(IDS[:, i : i + 1], past_key_values=cache)
    return cache


def continued(model: Any, cache: Any, steps: int = 20) -> torch.Tensor:
    """Return the logits (B, steps, vocabulary) of greedy tokens behind the cache."""
    token, logits = IDS[:, :1], []
    with torch.no_grad():
        for _ in range(steps):
            logits.append(model(token, past_key_values=cache).logits[:, -1])
            token = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits, 1)


def rows_of(cache: QuantForgeCache) -> list[torch.Tensor]:
    """Return all codes and scales of a cache, as rows."""
    out = []
    for layer in cache.layers:
        for t in (layer.keys, layer.values):
            for source in (t.source, *getattr(t, "others", ())):
                rows = getattr(source, "rows", source)
                out += [] if rows is None else [rows.packed, rows.scales]
    return out


def assert_same(a: QuantForgeCache, b: QuantForgeCache) -> None:
    assert a.get_seq_length() == b.get_seq_length()
    for x, y in zip(rows_of(a), rows_of(b), strict=True):
        assert torch.equal(x, y)
    for one, other in zip(a.layers, b.layers, strict=True):
        for x, y in ((one.keys, other.keys), (one.values, other.values)):
            assert torch.equal(x.dense, y.dense)
            assert torch.equal(x.dequantize(), y.dequantize())


def memory_of(*caches: QuantForgeCache) -> int:
    """Return the bytes of all distinct buffers."""
    storages = {}
    for cache in caches:
        for layer in cache.layers:
            for store in layer._stores():
                for t in store.tensors():
                    storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_model("llama")


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("settings", CACHES.values(), ids=CACHES)
def test_a_loaded_cache_continues_the_same_text(
    llama: Any, settings: dict[str, Any], mmap: bool, tmp_path: Path
) -> None:
    path = tmp_path / "prefix.safetensors"
    cache = filled(llama, **settings)
    cache.save(path)
    loaded = QuantForgeCache.load(path, mmap=mmap)
    assert (loaded.options, loaded.overrides) == (cache.options, cache.overrides)
    assert_same(loaded, cache)
    if not mmap:
        path.write_bytes(b"")  # nothing is read from it any more
    assert torch.equal(continued(llama, loaded), continued(llama, cache))
    assert_same(loaded, cache)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "qwen3"])
def test_families(family: str, tmp_path: Path) -> None:
    sliding = {"sliding_window": 48} if family == "mistral" else {}
    model = random_model(family, "eager" if family == "gemma2" else "sdpa", **sliding)
    cache = filled(model)
    cache.save(tmp_path / "a.safetensors")
    loaded = QuantForgeCache.load(tmp_path / "a.safetensors")
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
    assert torch.equal(continued(model, loaded, 30), continued(model, cache, 30))


def test_everything_a_store_holds_is_saved_or_follows(llama: Any) -> None:
    """A new attribute must be written to files, or be one that the settings give."""
    for family in ("llama", "gemma3_text"):
        for layer in filled(random_model(family)).layers:
            for store in layer._stores():
                assert set(vars(store)) <= SAVED | DERIVED
    assert set(vars(Store(CacheConfig(), CacheConfig().key_spec(64)))) <= SAVED | DERIVED


def test_generate_in_another_process(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "prefix.safetensors"
    cache = filled(llama)
    cache.save(path, model=llama, metadata={"text": "the prompt"})
    code = """
import sys, torch
from quantforge import QuantForgeCache
from tests.llm.models import random_model
from tests.llm.test_prompt_cache import continued
model = random_model("llama")
torch.save(continued(model, QuantForgeCache.load(sys.argv[1], model=model)), sys.argv[2])
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "out.pt")],
        env=environment,
        cwd=ROOT,
        check=True,
        timeout=120,
    )
    assert torch.equal(torch.load(tmp_path / "out.pt"), continued(llama, cache))
    assert read_metadata(path)["text"] == "the prompt"


def test_chat_goes_on_with_generate(llama: Any, tmp_path: Path) -> None:
    path, arguments = tmp_path / "a.safetensors", {"do_sample": False, "max_new_tokens": 20}
    cache = filled(llama)
    cache.save(path)
    ids = torch.cat([IDS, IDS[:, :5]], 1)
    mask = torch.ones_like(ids)
    expected = llama.generate(ids, attention_mask=mask, past_key_values=cache, **arguments)
    loaded = QuantForgeCache.load(path)
    got = llama.generate(ids, attention_mask=mask, past_key_values=loaded, **arguments)
    assert torch.equal(got, expected)


class TestLayouts:
    """Pages and rows hold the same codes: files do not tell them apart."""

    @pytest.mark.parametrize("bits", [2, 3, 4, (4, 2)], ids=str)
    def test_pages_to_rows_and_back(self, bits: Any, tmp_path: Path) -> None:
        x = torch.randn(2, 2, 1000, 128, generator=torch.Generator().manual_seed(0)).half()
        paged, plain = (QuantForgeCache(bits=bits, layout=layout) for layout in ("pages", "rows"))
        for cache in (paged, plain):
            cache.update(x[:, :, :900], -x[:, :, :900], 0)
            cache.update(x[:, :, 900:], -x[:, :, 900:], 0)
        assert paged.layers[0]._keys.pages is not None
        for cache, other in ((paged, "rows"), (plain, "pages")):
            cache.save(tmp_path / "a.safetensors")
            same = QuantForgeCache.load(tmp_path / "a.safetensors")
            assert same.options == cache.options
            assert_same(same, cache)
            moved = QuantForgeCache.load(tmp_path / "a.safetensors", layout=other)
            assert (moved.layers[0]._keys.pages is None) == (other == "rows")
            assert_same(moved, cache)
            for continuation in (cache, moved):
                continuation.update(x[:, :, :200], x[:, :, :200], 0)
            assert_same(moved, cache)

    def test_both_layouts_write_the_same_file(self, tmp_path: Path) -> None:
        x = torch.randn(1, 2, 700, 128, generator=torch.Generator().manual_seed(0)).half()
        arrays = []
        for layout in ("pages", "rows"):
            cache = QuantForgeCache(layout=layout)
            cache.update(x, x, 0)
            cache.save(tmp_path / layout)
            with safe_open(str(tmp_path / layout), "pt") as file:
                arrays.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        assert arrays[0].keys() == arrays[1].keys()
        assert all(torch.equal(arrays[0][name], arrays[1][name]) for name in arrays[0])

    @pytest.mark.gpu
    def test_from_the_gpu_to_the_cpu_and_back(self, tmp_path: Path) -> None:
        x = torch.randn(1, 2, 700, 128, device="cuda", dtype=torch.bfloat16)
        cache = QuantForgeCache()
        cache.update(x, x, 0)
        assert cache.layers[0]._keys.pages is not None
        cache.save(tmp_path / "gpu")
        on_cpu = QuantForgeCache.load(tmp_path / "gpu")
        assert on_cpu.layers[0]._keys.pages is None
        on_cpu.save(tmp_path / "cpu")
        back = QuantForgeCache.load(tmp_path / "cpu", device="cuda")
        assert back.layers[0]._keys.pages is not None
        assert_same(back, cache)
        for cpu, gpu in zip(rows_of(on_cpu), rows_of(cache), strict=True):
            assert torch.equal(cpu, gpu.cpu())


def test_what_has_been_cropped_is_not_in_the_file(llama: Any, tmp_path: Path) -> None:
    for removed in (5, 30, PROMPT - 2):
        cache = filled(llama)
        cache.crop(-removed)
        cache.save(tmp_path / "a.safetensors")
        loaded = QuantForgeCache.load(tmp_path / "a.safetensors")
        assert loaded.get_seq_length() == PROMPT - removed
        assert torch.equal(continued(llama, loaded), continued(llama, cache))


def test_cropped_tiers(llama: Any, tmp_path: Path) -> None:
    cache = filled(llama, **TIERS)
    cache.crop(-29)
    assert cache.layers[0]._keys.slots.dead
    cache.save(tmp_path / "a.safetensors")
    loaded = QuantForgeCache.load(tmp_path / "a.safetensors")
    assert torch.equal(continued(llama, loaded), continued(llama, cache))


@pytest.mark.parametrize("settings", [{}, TIERS], ids=["default", "tiers"])
def test_left_padding_is_remembered(llama: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    cache = QuantForgeCache(llama.config, **(SETTINGS | settings))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        llama(IDS[:, :20], attention_mask=mask, past_key_values=cache)
    assert cache.layers[0]._queries.padding is not None
    cache.save(tmp_path / "a.safetensors")
    loaded = QuantForgeCache.load(tmp_path / "a.safetensors")
    for one, other in zip(loaded.layers, cache.layers, strict=True):
        ours, theirs = vars(one._queries), vars(other._queries)
        assert ours.keys() == theirs.keys()
        for name in ("padding", "rows", "squares"):
            assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name]))
        assert torch.equal(one._queries.rms, other._queries.rms)
    mask = torch.cat([mask, torch.ones(2, 30, dtype=torch.long)], 1)
    with torch.no_grad():
        for each in (cache, loaded):
            llama(IDS[:, 20:50], attention_mask=mask, past_key_values=each)
    assert_same(loaded, cache)


def test_empty_caches_and_other_layers(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    QuantForgeCache(llama.config, **SETTINGS).save(path)
    loaded = QuantForgeCache.load(path)
    assert loaded.get_seq_length() == 0
    assert torch.equal(continued(llama, loaded), continued(llama, QuantForgeCache(**SETTINGS)))
    cache = QuantForgeCache()
    cache.layers = DynamicCache(config=llama.config).layers
    with torch.no_grad():
        llama(IDS, past_key_values=cache)
    cache.save(path)
    assert torch.equal(continued(llama, QuantForgeCache.load(path)), continued(llama, cache))


def test_mapped_rows_take_no_memory_of_their_own(tmp_path: Path) -> None:
    x = torch.randn(1, 4, 4000, 64)
    cache = QuantForgeCache(layout="rows")
    cache.update(x, x, 0)
    cache.save(tmp_path / "a.safetensors")
    loaded = QuantForgeCache.load(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    maps = Path("/proc/self/maps")
    if maps.exists():
        address = loaded.layers[0]._keys.packed.data_ptr()
        spans = [line.split() for line in maps.read_text().splitlines()]
        (line,) = (
            s for s in spans if (a := s[0].split("-")) and int(a[0], 16) <= address < int(a[1], 16)
        )
        assert line[-1] == str(tmp_path / "a.safetensors")
    loaded.update(x[:, :, :300], x[:, :, :300], 0)
    assert (tmp_path / "a.safetensors").read_bytes() == before, "a cache never writes to its file"


class TestModel:
    """The fingerprint of a model."""

    def test_is_checked(self, llama: Any, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        cache = filled(llama)
        cache.save(path, model=llama)
        assert_same(QuantForgeCache.load(path, model=copy.deepcopy(llama)), cache)
        other = copy.deepcopy(llama)
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight.neg_()
        with pytest.raises(InputError, match="fingerprint"):
            QuantForgeCache.load(path, model=other)
        cache.save(path)
        with pytest.raises(FormatError, match="does not say whose"):
            QuantForgeCache.load(path, model=llama)

    def test_is_that_of_the_checkpoint(self, llama: Any) -> None:
        half = copy.deepcopy(llama).to(torch.bfloat16)
        assert fingerprint(half) == fingerprint(copy.deepcopy(half).float())
        assert fingerprint(torch.compile(llama)) == fingerprint(llama)
        assert fingerprint(random_model("llama", num_hidden_layers=1)) != fingerprint(llama)

    def test_needs_weights(self, llama: Any) -> None:
        with pytest.raises(InputError, match="offloaded"):
            fingerprint(copy.deepcopy(llama).to("meta"))


# ---- files that are refused -------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Apply a change to the arrays and the cache entry of a file, as another program would."""
    with safe_open(str(path), "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    entry = json.loads(metadata["cache"])
    change(entry, tensors)
    metadata["cache"] = json.dumps(entry)
    save_plain({name: t.contiguous() for name, t in tensors.items()}, str(path), metadata)


def without(*names: str) -> Callable[[dict, dict], None]:
    return lambda entry, tensors: [tensors.pop(name) for name in names]


def put(name: str, f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, dict], None]:
    return lambda entry, tensors: tensors.update({name: f(tensors[name])})


def entry_but(**changes: Any) -> Callable[[dict, dict], None]:
    return lambda entry, tensors: entry.update(changes)


DAMAGED: dict[str, tuple[Callable[[dict, dict], None], str]] = {
    "version": (entry_but(version=2), "version must be 1; got 2"),
    "version true": (entry_but(version=True), "version must be 1; got True"),
    "no version": (lambda e, t: e.pop("version"), "version must be 1; got None"),
    "no layers": (lambda e, t: e.pop("layers"), "must have the fields"),
    "more fields": (entry_but(novel=1), "must have the fields"),
    "layers a number": (entry_but(layers=3), "layers has the wrong type"),
    "fewer layers": (lambda e, t: e["layers"].pop(), "belongs to none of the 1 layers"),
    "kind": (lambda e, t: e["layers"][0].update(kind="os.system"), "layer 0: kind must be one of"),
    "window": (
        lambda e, t: e["layers"].__setitem__(0, {"kind": "sliding", "sliding_window": -1,
                                                 "tokens": 3}),
        "sliding_window must be a number from 0",
    ),
    "new setting": (lambda e, t: e["settings"].update(novel=1), "settings must have the fields"),
    "setting missing": (lambda e, t: e["settings"].pop("sinks"), "settings must have the fields"),
    "setting": (lambda e, t: e["settings"].update(bits=99), "settings: .*bits"),
    "overrides": (lambda e, t: e.update(overrides={"x": {}}), "overrides must be by layer number"),
    "bits": (lambda e, t: e["settings"].update(bits=3), "layers.0: keys: spec must be"),
    "no shift": (lambda e, t: e["settings"].update(shift=False), "shift must be nothing"),
    "dense missing": (without("layers.1.values.dense"), "'values.dense' is missing"),
    "keys missing": (
        without(*(f"layers.0.keys.{p}" for p in ("packed", "scales", "shift", "equalizer"))),
        "packed",
    ),
    "dense batch": (put("layers.0.keys.dense", lambda t: t[:1]), "alike but for dim"),
    "dense dtype": (put("layers.0.keys.dense", lambda t: t.int()), "alike but for dim"),
    "foreign array": (lambda e, t: t.update(x=torch.ones(1)), "'x' belongs to none"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case: str, llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    filled(llama).save(path)
    rewritten(path, lambda entry, tensors: None)
    QuantForgeCache.load(path)  # the control
    change, message = DAMAGED[case]
    rewritten(path, change)
    with pytest.raises(FormatError, match=message):
        QuantForgeCache.load(path)


SLOTS: dict[str, tuple[Callable[[dict, dict], None], str]] = {
    "missing": (without("layers.0.slots"), "slots must be an array"),
    "dtype": (put("layers.0.slots", lambda t: t.int()), "slots must be an array of torch.uint8"),
    "tier": (put("layers.0.slots", lambda t: t * 0), "slots must name"),
    "blocks": (put("layers.0.slots.blocks", lambda t: t + 1), "must count the packed rows"),
    "shape": (put("layers.0.slots", lambda t: t[:, :, 1:]), "must count the packed rows"),
    "dead": (
        lambda e, t: t.update({"layers.0.slots.dead": torch.tensor([[0, 999]]).int()}),
        "slots.dead must lie within",
    ),
}


@pytest.mark.parametrize("case", SLOTS)
def test_damaged_tiers_are_refused(case: str, llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    filled(llama, **TIERS).save(path)
    change, message = SLOTS[case]
    rewritten(path, change)
    with pytest.raises(FormatError, match=message):
        QuantForgeCache.load(path)


def test_truncated_and_foreign_files_are_refused(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    filled(llama).save(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match="not a readable safetensors file"):
            QuantForgeCache.load(path)
    save_plain({"x": torch.ones(2)}, str(path))
    with pytest.raises(FormatError, match="not written by quantforge"):
        QuantForgeCache.load(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(FormatError, match="holds no cache"):
        QuantForgeCache.load(path)
    save_file({"x": torch.ones(2)}, path, metadata={"cache": "{"})
    with pytest.raises(FormatError, match="not valid JSON"):
        QuantForgeCache.load(path)
    with pytest.raises(FileNotFoundError):
        QuantForgeCache.load(tmp_path / "none.safetensors")


def test_refused_arguments(llama: Any, tmp_path: Path) -> None:
    path, cache = tmp_path / "a.safetensors", filled(llama)
    with pytest.raises(InputError, match="taken by the cache"):
        cache.save(path, metadata={"cache": "mine"})
    with pytest.raises(InputError, match="must map strings to strings"):
        cache.save(path, metadata={"n": 3})  # type: ignore[dict-item]
    assert not path.exists()
    cache.save(path)
    before = path.read_bytes()
    cache.layers[1] = object()
    with pytest.raises(UnsupportedError, match="layer 1: files do not hold a object"):
        cache.save(path)
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="one for each of 2 layers"):
        QuantForgeCache.load(path, device=["cpu"])
    assert_same(QuantForgeCache.load(path, device=["cpu", "cpu"]), filled(llama))


def test_kinds_have_one_class_each() -> None:
    assert len({kind.layer for kind in KINDS.values()}) == len(KINDS)


def test_settings_survive_json() -> None:
    options = CacheConfig(bits=(4, 2), head_bits={1: (8, 4), 3: 2}, seed=3, key_scale_rule="mse")
    from quantforge.llm.cache_file import _config

    text = json.dumps(dataclasses.asdict(options))
    assert _config("file", json.loads(text), None) == options
    tiers = CacheConfig(**TIERS)
    assert _config("file", json.loads(json.dumps(dataclasses.asdict(tiers))), None) == tiers


def test_the_how_to_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "prompt_caches.md").read_text("utf-8")
    scope: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "prompt_caches.md", "exec"), scope)
    first, last = scope["out"], scope["answers"][0]
    assert torch.equal(first[:, : last.shape[1]], last)
    assert scope["answers"][1].shape[1] > scope["prompt"].shape[1] + 8
