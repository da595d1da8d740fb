"""Quantized KV caches for transformers models."""

from quantforge.llm.cache import CacheConfig, QuantForgeCache

__all__ = ["CacheConfig", "QuantForgeCache"]
