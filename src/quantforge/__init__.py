"""quantforge: vectors in 1-8 bits, as PyTorch tensors that stay compressed.

    from quantforge import QuantTensor, QuantForgeConfig

    codes = QuantTensor.quantize(embeddings, QuantForgeConfig(bits=4))
    scores = queries @ codes.T

Importing the package loads nothing: names are imported when they are first asked for, and
`QuantTensor` brings torch and registers the operators. Where torch is loaded already, they are
registered at once, so that `torch.load` knows QuantTensors.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantforge import dispatch, ops
    from quantforge.config import QuantForgeConfig
    from quantforge.errors import (
        ConfigError,
        FormatError,
        InputError,
        QuantForgeError,
        UnsupportedError,
    )
    from quantforge.io import load_file, save_file
    from quantforge.llm import QuantForgeCache
    from quantforge.pipeline import QuantPipeline
    from quantforge.quantizer import TurboQuantizer
    from quantforge.spec import QuantSpec
    from quantforge.tensor import QuantizedTensor, QuantTensor

__version__ = "0.1.0"

_MODULES = {
    "ConfigError": "errors",
    "FormatError": "errors",
    "InputError": "errors",
    "QuantForgeCache": "llm",
    "QuantForgeConfig": "config",
    "QuantForgeError": "errors",
    "QuantPipeline": "pipeline",
    "QuantSpec": "spec",
    "QuantTensor": "tensor",
    "QuantizedTensor": "tensor",
    "TurboQuantizer": "quantizer",
    "UnsupportedError": "errors",
    "load_file": "io",
    "save_file": "io",
}
_SUBPACKAGES = ("dispatch", "ops")

__all__ = [
    "ConfigError",
    "FormatError",
    "InputError",
    "QuantForgeCache",
    "QuantForgeConfig",
    "QuantForgeError",
    "QuantPipeline",
    "QuantSpec",
    "QuantTensor",
    "QuantizedTensor",
    "TurboQuantizer",
    "UnsupportedError",
    "__version__",
    "dispatch",
    "load_file",
    "ops",
    "save_file",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(f"quantforge.{_MODULES[name]}"), name)
    elif name in _SUBPACKAGES:
        value = import_module(f"quantforge.{name}")
    else:
        raise AttributeError(f"module 'quantforge' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if "torch" in sys.modules:
    import_module("quantforge.tensor")
