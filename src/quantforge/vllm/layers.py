"""Bits by layer: vLLM asks a "quantization method" about every layer, and it may change it.

This is the one place where vLLM shows a backend which layer it is for. The method quantizes no
weights.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import extract_layer_index

from quantforge.errors import ConfigError
from quantforge.vllm.backend import PackedImpl, backend_of

NAME = "quantforge"


class LayerBits(QuantizationConfig):
    """Gives the attention layers their bits, and leaves weights as they are."""

    @classmethod
    def get_name(cls) -> str:
        """Return the method's name."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return dtypes of the model."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the compute capability that is needed: any."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return files of the model with settings: none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LayerBits:
        """Return the method; its settings are in `additional_config`."""
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Set the bits of an attention layer."""
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if isinstance(layer, Attention):
            impl = layer.impl
            if not isinstance(impl, PackedImpl):
                raise ConfigError(
                    'quantization="quantforge" needs settings and, on a GPU, the attention backend '
                    "CUSTOM; start with quantforge.vllm.options(...)"
                )
            impl.bits = impl.settings.of_layer(extract_layer_index(prefix))
            layer.attn_backend = backend_of(impl.settings, impl.bits)
        return None


def register() -> None:
    """Make the method known to vLLM, once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(LayerBits)
