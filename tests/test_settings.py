"""Files of settings: what is written is read, and errors name the file, the section, the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantforge import QuantForgeCache, QuantForgeConfig, settings
from quantforge.errors import ConfigError, FormatError
from quantforge.vectordb import IndexConfig

VECTORS = QuantForgeConfig(bits=3, rotation="qr", codebook="gaussian", shift=True, seed=7)
INDEX = IndexConfig(bits=5, mode="centred", metric="l2")
CACHE: dict[str, Any] = {
    "bits": (4, 3), "window": 64, "layers": {1: {"bits": 8}, 3: {"head_bits": {0: (2, 3)}}},
}  # fmt: skip


def write(path: Path, **sections: Any) -> Path:
    path.write_text(json.dumps({settings.MARK: settings.VERSION, **sections}))
    return path


def test_one_file_serves_all_readers(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    sections = {"vectors": VECTORS.to_dict(), "index": INDEX.to_dict(), "cache": CACHE}
    settings.write(path, sections)
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]
    assert QuantForgeConfig.from_file(path) == VECTORS
    assert IndexConfig.from_file(path) == INDEX
    cache, expected = QuantForgeCache.from_file(path, sinks=4), QuantForgeCache(sinks=4, **CACHE)
    assert cache.options == expected.options
    assert cache.overrides == expected.overrides


def test_save_of_each_config(tmp_path: Path) -> None:
    for config in (VECTORS, INDEX):
        config.save(tmp_path / "one.json")
        assert type(config).from_file(tmp_path / "one.json") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "has no settings"),
        ('{"bits": 4}', "has no settings"),
        ('{"quantforge_settings": 2, "vectors": {}}', "quantforge_settings must be 1; got 2"),
        ('{"quantforge_settings": 1, "index": {}}', r"no section 'vectors'; it has \['index'\]"),
        ('{"quantforge_settings": 1, "vectors": 4}', "'vectors' must be an object"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        QuantForgeConfig.from_file(path)


@pytest.mark.parametrize(
    ("reader", "values", "message"),
    [
        (QuantForgeConfig, {"bits": 9}, "bits must be an integer from 1 to 8; got 9"),
        (QuantForgeConfig, {"bit": 4}, r"unknown settings \['bit'\]"),
        (QuantForgeConfig, {"shift": "yes"}, "shift must be True or False"),
        (IndexConfig, {"mode": "best"}, "mode must be one of"),
        (QuantForgeCache, {"bits": "4"}, "bits must be a number or a pair"),
        (QuantForgeCache, {"windows": 4}, r"unknown settings \['windows'\]"),
        (QuantForgeCache, {"shift": 1}, "shift must be true or false"),
        (QuantForgeCache, {"budget": "2.4"}, "budget must be a number"),
        (QuantForgeCache, {"preset": 3}, "preset must be a name"),
        (QuantForgeCache, {"importance": 4}, "importance must be a list"),
        (QuantForgeCache, {"max_cache_len": -1}, "max_cache_len must be a positive integer"),
        (QuantForgeCache, {"head_bits": {"first": 4}}, "head_bits must be an object with keys"),
        (QuantForgeCache, {"layers": [4]}, "layers must be an object with keys"),
        (QuantForgeCache, {"layers": {"2": 4}}, "layer 2 must be an object"),
        (QuantForgeCache, {"layers": {"2": {"preset": "small"}}}, "layer 2: unknown settings"),
        (QuantForgeCache, {"layers": {"2": {"bits": 0}}}, "bits must be an integer from 1 to 8"),
    ],
)
def test_bad_settings_are_named(
    tmp_path: Path, reader: Any, values: dict[str, Any], message: str
) -> None:
    section = {QuantForgeConfig: "vectors", IndexConfig: "index", QuantForgeCache: "cache"}[reader]
    path = write(tmp_path / "x.json", **{section: values})
    with pytest.raises(ConfigError, match=f"x.json, section '{section}': .*{message}"):
        reader.from_file(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    VECTORS.save(path)
    with pytest.raises(TypeError):
        settings.write(path, {"cache": {"bits": object()}})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert QuantForgeConfig.from_file(path) == VECTORS
