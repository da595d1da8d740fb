"""The operator library: one place that turns schema, fake and implementations into an operator.

An operator has an `eager` implementation for every device. A folder may also hold `triton.py`
(CUDA) and `native.py` (CPU), the fast backends; each exports

    supports(*args) -> str | None     the reason why these arguments are not for it, or None
    <operator>(*args)                 the implementation, with the arguments of the schema

The registered operator takes the fast backend of the device where it supports the call and eager
torch otherwise, and logs the reason once.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, Literal, get_args

import torch

from quantforge.errors import ConfigError, UnsupportedError

NAMESPACE = "quantforge"
Impl = Literal["auto", "eager", "triton", "native"]
"""How to run an operator: "auto" chooses; an explicit choice never falls back."""
FAST_BACKENDS = {"CPU": "native", "CUDA": "triton"}
DEVICES = tuple(FAST_BACKENDS)

_library = torch.library.Library(NAMESPACE, "DEF")
_eager: dict[str, Callable[..., Any]] = {}
_log = logging.getLogger(NAMESPACE)


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    eager: Callable[..., Any],
    fast: tuple[str, ...] = (),
) -> Any:
    """Define `quantforge::<schema>` and return the callable overload.

    `fast` names the operator's fast backends. `Library.define` costs a third of
    `torch.library.custom_op` per call and, unlike `triton_op`, compiles on CPU; a call sits in
    every layer of every decode step.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _eager[name] = eager
    for device, backend in FAST_BACKENDS.items():
        run = _preferring(name, backend) if backend in fast else eager
        _library.impl(name, partial(_without_autocast, run), device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def run(name: str, impl: Impl, *args: Any) -> Any:
    """Run an operator by the implementation asked for.

    Raises:
        ConfigError: for an unknown `impl`.
        UnsupportedError: if an explicitly chosen backend cannot run these arguments.
    """
    if impl == "auto":
        return getattr(getattr(torch.ops, NAMESPACE), name).default(*args)
    if impl == "eager":
        return _without_autocast(_eager[name], *args)
    if impl not in get_args(Impl):
        raise ConfigError(f"impl must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    module, reason = _choose(name, impl, args)
    if reason is not None:
        raise UnsupportedError(f'{name} with impl="{impl}": {reason}; use impl="auto"')
    return _without_autocast(getattr(module, name), *args)


def _without_autocast(function: Callable[..., Any], *args: Any) -> Any:
    """Call an implementation, whose own products autocast would round to half precision."""
    device = args[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return function(*args)
    with torch.autocast(device, enabled=False):
        return function(*args)


def _choose(name: str, backend: str, args: tuple) -> tuple[ModuleType | None, str | None]:
    """Return the module of a backend, and the reason why it cannot run the call, if any."""
    module = load_backend(name, backend)
    if isinstance(module, str):
        return None, module
    return module, module.supports(*args)


@lru_cache
def load_backend(name: str, backend: str) -> ModuleType | str:
    """Import the backend of an operator; return the reason instead where there is none."""
    path = f"quantforge.ops.{name}.{backend}"
    if importlib.util.find_spec(path) is None:
        return f"{name} has no {backend} implementation"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return importlib.import_module(path)


def _preferring(name: str, backend: str) -> Callable[..., Any]:
    """Return an implementation that takes a fast backend where it supports the call."""
    eager = _eager[name]

    def call(*args: Any) -> Any:
        module, reason = _choose(name, backend, args)
        if reason is None:
            return getattr(module, name)(*args)
        _log_once(name, backend, reason)
        return eager(*args)

    def call_on_its_device(*args: Any) -> Any:
        """Launch kernels on the GPU of the tensors, whichever is the current one."""
        index = args[0].device.index
        if index == torch.cuda.current_device():
            return call(*args)
        with torch.cuda.device(index):
            return call(*args)

    return call if FAST_BACKENDS["CPU"] == backend else call_on_its_device


@lru_cache
def _log_once(name: str, backend: str, reason: str) -> None:
    _log.info("%s runs in eager torch, not %s: %s", name, backend, reason)
