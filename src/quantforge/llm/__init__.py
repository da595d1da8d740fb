"""Quantized KV caches for transformers models."""

from quantforge.llm.attention import quantforge_attention
from quantforge.llm.cache import QuantForgeCache
from quantforge.llm.evaluation import Evaluation, evaluate
from quantforge.llm.fidelity import Fidelity, fidelity
from quantforge.llm.options import CacheConfig
from quantforge.llm.patch import patch_model, unpatch_model
from quantforge.llm.presets import PRESETS

__all__ = [
    "PRESETS",
    "CacheConfig",
    "Evaluation",
    "Fidelity",
    "QuantForgeCache",
    "evaluate",
    "fidelity",
    "patch_model",
    "quantforge_attention",
    "unpatch_model",
]
