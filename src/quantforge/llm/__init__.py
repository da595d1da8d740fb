"""Quantized KV caches for transformers models."""

from quantforge.llm.cache import QuantForgeCache
from quantforge.llm.fidelity import Fidelity, fidelity
from quantforge.llm.options import CacheConfig

__all__ = ["CacheConfig", "Fidelity", "QuantForgeCache", "fidelity"]
