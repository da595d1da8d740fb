"""Settings of a cache as JSON has them: names of layers and heads are strings, types unchecked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from quantforge.errors import ConfigError
from quantforge.llm.options import CacheConfig

OF_THE_CACHE = ("preset", "layers", "max_cache_len", "offloading", "offload_only_non_sliding")
_FIELDS = tuple(field.name for field in dataclasses.fields(CacheConfig))
_BOOLS = ("shift", "equalizer", "offloading", "offload_only_non_sliding")


def checked_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of QuantForgeCache from plain values, the types of all of them checked.

    Raises:
        ConfigError: for an unknown setting, or one of a wrong type, with its name and layer.
    """
    _check_names(values, (*OF_THE_CACHE, *_FIELDS), "")
    checked = {name: _checked(name, value) for name, value in values.items() if name != "layers"}
    if "layers" in values:
        checked["layers"] = {
            index: _checked_layer(index, settings)
            for index, settings in _by_index("layers", values["layers"]).items()
        }
    return checked


def _checked_layer(index: int, settings: Any) -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        raise ConfigError(f"layer {index} must be an object of settings; got {settings!r}")
    _check_names(settings, _FIELDS, f"layer {index}: ")
    return {name: _checked(name, value) for name, value in settings.items()}


def _check_names(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"{where}unknown settings {unknown}; known are {sorted(known)}")


def _checked(name: str, value: Any) -> Any:
    if name in _BOOLS and type(value) is not bool:
        raise ConfigError(f"{name} must be true or false; got {value!r}")
    if name == "budget" and value is not None and type(value) not in (int, float):
        raise ConfigError(f"budget must be a number or null; got {value!r}")
    if name == "preset" and value is not None and not isinstance(value, str):
        raise ConfigError(f"preset must be a name or null; got {value!r}")
    if name == "max_cache_len" and value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"max_cache_len must be a positive integer or null; got {value!r}")
    if name == "importance" and not isinstance(value, list | tuple):
        raise ConfigError(f"importance must be a list of bits; got {value!r}")
    return _by_index(name, value) if name == "head_bits" else value


def _by_index(name: str, value: Any) -> dict[int, Any]:
    """Return a mapping whose keys are integers from 0, as numbers or digits."""
    if not isinstance(value, Mapping) or not all(str(key).isdecimal() for key in value):
        raise ConfigError(f'{name} must be an object with keys like "0"; got {value!r}')
    return {int(key): item for key, item in value.items()}
