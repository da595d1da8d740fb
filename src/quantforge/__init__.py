"""quantforge: vectors in 1-8 bits, as PyTorch tensors that stay compressed.

    from quantforge import QuantTensor, QuantForgeConfig

    codes = QuantTensor.quantize(embeddings, QuantForgeConfig(bits=4))
    scores = queries @ codes.T

Importing the package loads torch and registers the operators; transformers and safetensors are
loaded by the parts that need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantforge import dispatch, ops
from quantforge.config import QuantForgeConfig
from quantforge.errors import (
    ConfigError,
    FormatError,
    InputError,
    QuantForgeError,
    UnsupportedError,
)
from quantforge.spec import QuantSpec
from quantforge.tensor import QuantizedTensor, QuantTensor

if TYPE_CHECKING:
    from quantforge.io import load_file, save_file
    from quantforge.llm import QuantForgeCache
    from quantforge.pipeline import QuantPipeline
    from quantforge.quantizer import TurboQuantizer

__version__ = "0.1.0"

_LAZY = {
    "QuantForgeCache": "quantforge.llm",
    "QuantPipeline": "quantforge.pipeline",
    "TurboQuantizer": "quantforge.quantizer",
    "load_file": "quantforge.io",
    "save_file": "quantforge.io",
}

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
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'quantforge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
