"""Quantized KV caches for transformers models."""

from quantforge.llm.attention import quantforge_attention
from quantforge.llm.cache import QuantForgeCache
from quantforge.llm.fidelity import Fidelity, fidelity
from quantforge.llm.options import CacheConfig
from quantforge.llm.patch import patch_model, unpatch_model

__all__ = [
    "CacheConfig",
    "Fidelity",
    "QuantForgeCache",
    "fidelity",
    "patch_model",
    "quantforge_attention",
    "unpatch_model",
]
