"""Caches in files: the keys and values of a prompt, computed once and continued anywhere.

A safetensors file as `quantforge.io` writes them (docs/format.md), with arrays `layers.<i>.<name>`
(`llm.saved_layers`) and one more entry in its header:

    "cache"    JSON {"version", "settings", "overrides", "model", "layers": [{"kind", ...}, ...]}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from quantforge.errors import ConfigError, FormatError, InputError, UnsupportedError
from quantforge.io import QuantFile, open_file, save_file
from quantforge.llm.fingerprint import fingerprint
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.layer_kinds import KINDS, kind_of
from quantforge.llm.options import CacheConfig
from quantforge.llm.saved_layers import Fields, Tensors

ENTRY = "cache"
VERSION = 1
ENTRY_FIELDS: dict[str, Any] = {
    "settings": dict,
    "overrides": dict,
    "model": (str, type(None)),
    "layers": list,
}
SETTINGS = {field.name for field in dataclasses.fields(CacheConfig)}
LATER = {"outlier_bits": None}
"""Settings that older files lack, and what they then are; they are written where they differ."""


def save_cache(
    cache: Any, path: str | PathLike[str], model: Any, metadata: Mapping[str, str] | None
) -> None:
    """Write a cache; see `PromptCache.save`."""
    metadata = dict(metadata or {})
    if ENTRY in metadata:
        raise InputError(f"the metadata key {ENTRY!r} is taken by the cache itself; use another")
    tensors: Tensors = {}
    layers: list[Fields] = []
    for index, layer in enumerate(cache.layers):
        try:
            name = kind_of(layer)
            written = KINDS[name].write(layer)
        except UnsupportedError as error:
            raise UnsupportedError(f"layer {index}: {error}") from error
        tensors |= {f"layers.{index}.{key}": t for key, t in written.items()}
        numbers = {key: getattr(layer, attr) for key, attr in KINDS[name].fields.items()}
        layers.append({"kind": name, **numbers})
    entry = {
        "version": VERSION,
        "settings": _written(cache.options),
        "overrides": {i: _written(options) for i, options in _overrides(cache).items()},
        "model": None if model is None else fingerprint(model),
        "layers": layers,
    }
    save_file(tensors, path, metadata={ENTRY: json.dumps(entry), **metadata})


def _written(options: CacheConfig) -> Fields:
    fields = dataclasses.asdict(options)
    return {name: x for name, x in fields.items() if name not in LATER or x != LATER[name]}


def _overrides(cache: Any) -> dict[int, CacheConfig]:
    """Return the settings of layers that differ from those of the cache, found ones included."""
    found = {
        index: layer.options
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, QuantForgeLayer) and layer.options != layer.given
    }
    return cache.overrides | found


def load_cache(
    cls: type,
    path: str | PathLike[str],
    device: Any | Sequence[Any],
    mmap: bool,
    model: Any,
    layout: str | None,
    max_cache_len: int | str | None,
) -> Any:
    """Read a cache; see `PromptCache.load`."""
    with open_file(path) as file:
        entry = _entry(str(path), file)
        layers, length = _with_buffers(str(path), entry["layers"], max_cache_len)
        count = len(layers)
        options, overrides = _settings(f"{path}: header entry {ENTRY!r}", entry, layout)
        names = _names_by_layer(str(path), file, count)
    _check_model(str(path), entry["model"], model)
    devices = _devices(device, model, count)
    layer_settings = {i: vars(o) for i, o in overrides.items()}
    cache = cls(layers=layer_settings, max_cache_len=length, **vars(options))
    files = {d: open_file(path, device=d) for d in set(devices)}
    try:
        with torch.inference_mode(False), torch.no_grad():
            for i, fields in enumerate(layers):
                tensors = {key: files[devices[i]][f"layers.{i}.{key}"] for key in names[i]}
                if not mmap:
                    tensors = {key: t.clone() for key, t in tensors.items()}
                where = f"{path}: layers.{i}"
                cache.layers.append(_layer(where, overrides.get(i, options), fields, tensors))
    finally:
        for opened in files.values():
            opened.close()
    return cache


def _layer(where: str, options: CacheConfig, fields: Fields, tensors: Tensors) -> Any:
    kind = KINDS[fields["kind"]]
    try:
        layer = kind.make(options, fields)
        kind.fill(layer, tensors)
    except (ConfigError, InputError, FormatError) as error:
        raise FormatError(f"{where}: {error}") from error
    for name, attribute in kind.fields.items():
        setattr(layer, attribute, fields[name])
    return layer


def _with_buffers(
    where: str, layers: list[Fields], max_cache_len: int | str | None
) -> tuple[list[Fields], int | None]:
    """Return layers of fixed buffers or growing ones, as asked for, and the tokens of buffers."""
    length: Any = max_cache_len
    if max_cache_len == "saved":
        saved = {fields["max_cache_len"] for fields in layers if fields["kind"] == "static"}
        if len(saved) > 1:
            raise FormatError(f"{where}: max_cache_len must be one for all layers; got {saved}")
        length = saved.pop() if saved else None
    if length is None:
        return [{"kind": "full"} if f["kind"] == "static" else f for f in layers], None
    for index, fields in enumerate(layers):
        if fields["kind"] not in ("full", "static"):
            raise UnsupportedError(
                f"{where}: layer {index} is {fields['kind']!r}, which cannot have max_cache_len; "
                "load it with max_cache_len=None"
            )
    return [{"kind": "static", "max_cache_len": length}] * len(layers), length


def _devices(device: Any, model: Any, count: int) -> list[torch.device]:
    """Return the device of each layer."""
    if device is None:
        device = "cpu" if model is None else model.device
    if not isinstance(device, Sequence) or isinstance(device, str):
        return [torch.device(device)] * count
    if len(device) != count:
        raise InputError(f"device must be one, or one for each of {count} layers; got {device!r}")
    return [torch.device(d) for d in device]


def _check_model(where: str, expected: str | None, model: Any) -> None:
    if model is None:
        return
    if expected is None:
        raise FormatError(
            f"{where} does not say whose keys and values it holds, so model= cannot be checked; "
            "save it with model=, or load it without and give a device"
        )
    if (got := fingerprint(model)) != expected:
        raise InputError(
            f"{where} belongs to a model with the fingerprint {expected}; this model has {got}. "
            "Keys and values mean nothing to other weights or adapters; compute the cache anew"
        )


# ---- the entry of the header ------------------------------------------------------------------


def _entry(where: str, file: QuantFile) -> Fields:
    """Return the checked JSON of a file."""
    text = file.metadata.get(ENTRY)
    if text is None:
        raise FormatError(
            f"{where} holds no cache: its header has no {ENTRY!r} entry; quantforge.load_file "
            "reads tensors"
        )
    where = f"{where}: header entry {ENTRY!r}"
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {error}") from error
    version = entry.get("version") if isinstance(entry, dict) else None
    if type(version) is not int or version != VERSION:
        raise FormatError(
            f"{where}: version must be {VERSION}; got {version!r:.80}; upgrade quantforge if the "
            "file is newer"
        )
    _check_fields(where, entry, {"version", *ENTRY_FIELDS})
    for field, kind in ENTRY_FIELDS.items():
        if not isinstance(entry[field], kind):
            raise FormatError(f"{where}: {field} has the wrong type; got {entry[field]!r:.80}")
    for index, fields in enumerate(entry["layers"]):
        _check_layer(f"{where}: layer {index}", fields)
    return entry


def _check_fields(where: str, value: Any, expected: set[str]) -> None:
    if not isinstance(value, dict) or set(value) != expected:
        got = sorted(value) if isinstance(value, dict) else value
        raise FormatError(f"{where} must have the fields {sorted(expected)}; got {got!r:.200}")


def _check_layer(where: str, fields: Any) -> None:
    kind = fields.get("kind") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(f"{where}: kind must be one of {', '.join(KINDS)}; got {kind!r:.80}")
    _check_fields(where, fields, {"kind", *KINDS[kind].fields})
    for name in KINDS[kind].fields:
        if type(fields[name]) is not int or fields[name] < 0:
            raise FormatError(f"{where}: {name} must be a number from 0; got {fields[name]!r:.80}")


def _settings(
    where: str, entry: Fields, layout: str | None
) -> tuple[CacheConfig, dict[int, CacheConfig]]:
    options = _config(f"{where}: settings", entry["settings"], layout)
    overrides = {}
    for index, values in entry["overrides"].items():
        if not index.isdecimal():
            raise FormatError(f"{where}: overrides must be by layer number; got {index!r:.80}")
        overrides[int(index)] = _config(f"{where}: overrides of {index}", values, layout)
    return options, overrides


def _config(where: str, values: Any, layout: str | None) -> CacheConfig:
    if isinstance(values, dict):
        values = LATER | values
    _check_fields(where, values, SETTINGS)
    chosen = {} if layout is None else {"layout": layout}
    try:
        return CacheConfig(**{name: _plain(value) for name, value in (values | chosen).items()})
    except (ConfigError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}") from error


def _plain(value: Any) -> Any:
    """Return what JSON made of a setting as it was: tuples, and numbers as keys."""
    if isinstance(value, dict):
        return {int(key): _plain(v) for key, v in value.items()}
    return tuple(_plain(v) for v in value) if isinstance(value, list) else value


def _names_by_layer(where: str, file: QuantFile, count: int) -> list[list[str]]:
    """Return the names of each layer's arrays, without their prefix."""
    names: list[list[str]] = [[] for _ in range(count)]
    for name in file:
        first, _, rest = name.partition(".")
        index, _, key = rest.partition(".")
        if first != "layers" or not index.isdecimal() or int(index) >= count or not key:
            raise FormatError(f"{where}: array {name!r} belongs to none of the {count} layers")
        names[int(index)].append(key)
    return names
