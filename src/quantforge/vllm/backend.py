"""vLLM's classes: the backend, what a step knows of its batch, and the layer's part of it.

vLLM asks for `Chosen` when it builds an attention layer. That is vLLM's CPU backend for a model
without settings, else a class of its own for each pair of bits, since the size of a token is asked
of the class.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from quantforge.errors import UnsupportedError
from quantforge.vllm.attend import Batch, attend
from quantforge.vllm.pages import BlockFormat, Statistics
from quantforge.vllm.settings import KEY, BitsPair, Settings
from quantforge.vllm.statistics import load_layer

BLOCK_MULTIPLE = 16
"""Tokens: rows of every width then end at multiples of 16 bytes."""


def settings_of(config: VllmConfig) -> Settings | None:
    """Return the settings of a model, or None if it has none."""
    values = config.additional_config.get(KEY) if config.additional_config else None
    return None if values is None else Settings.from_dict(values)


class PackedBackend(AttentionBackend):
    """Attention over packed keys and values; `backend_of` makes one for each pair of bits."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    settings: ClassVar[Settings]
    bits: ClassVar[BitsPair]

    @staticmethod
    def get_name() -> str:
        """Return the name that vLLM's registry knows the backend by."""
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Return which numbers of tokens a block may hold."""
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the one layout in which the bytes of a head in a block are contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Return how many bytes a token of a head takes."""
        if spec.state_content_bytes is not None:
            return spec
        size = cls.settings.token_bytes(spec.head_size, spec.head_size_v, cls.bits)
        return replace(spec, dtype=torch.uint8, state_content_bytes=size)

    @staticmethod
    def get_impl_cls() -> type[PackedImpl]:
        """Return the layer's part."""
        return PackedImpl

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        """Return what describes a step's batch."""
        return BatchBuilder


@lru_cache(maxsize=64)
def backend_of(settings: Settings, bits: BitsPair) -> type[PackedBackend]:
    """Return the backend of layers with these bits."""
    name = f"Packed{bits[0]}K{bits[1]}V"
    return type(name, (PackedBackend,), {"settings": settings, "bits": bits})


def __getattr__(name: str) -> Any:
    if name != "Chosen":
        raise AttributeError(name)
    settings = settings_of(get_current_vllm_config())
    if settings is not None:
        return backend_of(settings, settings.bits)
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    raise UnsupportedError(
        f'the attention backend CUSTOM is quantforge\'s, and additional_config has no "{KEY}"; '
        "start with quantforge.vllm.options(...), or without this backend"
    )


class BatchBuilder(AttentionMetadataBuilder):
    """Describes the batch of a step to all layers with the same blocks."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if device.type != "cpu":
            self._init_reorder_batch_threshold(1)  # sequences with one new token come first
        # a captured graph reads this address
        most = vllm_config.scheduler_config.max_num_seqs
        self._stored = torch.zeros(most, dtype=torch.int32, device=device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        """Return which tokens belong to which sequence."""
        common = common_attn_metadata
        n = common.num_reqs
        starts = common.query_start_loc_cpu[: n + 1].tolist()
        stored = self._stored[:n]
        new = common.query_start_loc[1 : n + 1] - common.query_start_loc[:n]
        torch.sub(common.seq_lens[:n], new, out=stored)
        return Batch(
            starts,
            stored,
            common.max_seq_len,
            self._stored_list(common, starts, stored),
            common.block_table_tensor[:n],
        )

    def _stored_list(
        self, common: CommonAttentionMetadata, starts: list[int], stored: torch.Tensor
    ) -> list[int]:
        """Return what `Batch` has; waits for a GPU only for what vLLM does not know exactly.

        vLLM's bound is exact but for tokens that were drafted and may have been rejected.
        """
        bound = common.seq_lens_cpu_upper_bound
        if stored.is_cuda and bound is not None and self.vllm_config.speculative_config is None:
            lengths = bound[: common.num_reqs].tolist()
            ends = zip(lengths, starts, starts[1:], strict=False)
            return [length - (stop - start) for length, start, stop in ends]
        return stored.tolist()


class PackedImpl(AttentionImpl):
    """Stores a layer's keys and values, and attends to them."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        unsupported = {
            "ALiBi slopes": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "a logit soft-cap": bool(logits_soft_cap),
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "attention sinks": sinks is not None,
            "shared layers": kv_sharing_target_layer_name is not None,
        }
        if reasons := [name for name, present in unsupported.items() if present]:
            raise UnsupportedError(
                f"quantforge's cache for vLLM has no {', '.join(reasons)}, which this model needs; "
                "start without quantforge, or use transformers with QuantForgeCache"
            )
        config = get_current_vllm_config()
        settings = settings_of(config)
        assert settings is not None, "Chosen has looked"
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, float(scale)
        self.settings, self.bits = settings, settings.bits
        self._statistics: Statistics | None = None

    def _format(self, key_dim: int, value_dim: int) -> BlockFormat:
        return BlockFormat(*self.settings.specs(key_dim, value_dim, self.bits))

    def _statistics_of(self, layer: Any, device: torch.device) -> Statistics:
        if self._statistics is None:
            self._statistics = Statistics()
            if (path := self.settings.statistics) is not None:
                first = get_tensor_model_parallel_rank() * self.num_kv_heads
                heads = slice(first, first + self.num_kv_heads)
                index = extract_layer_index(layer.layer_name)
                self._statistics = load_layer(path, index, heads, device)
        return self._statistics

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store the tokens of a step."""
        if kv_cache.numel() == 0:  # while the memory is being measured
            return
        n = slot_mapping.shape[0]
        self._format(key.shape[-1], value.shape[-1]).store(
            kv_cache, key[:n], value[:n], slot_mapping, self._statistics_of(layer, key.device)
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Batch | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from the tokens of a step to their sequences; returns output, written."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("quantforge's cache for vLLM does not quantize outputs")
        if attn_metadata is None:  # while the memory is being measured
            return output.fill_(0)
        attend(
            *(query, key, value, kv_cache, attn_metadata),
            self._format(key.shape[-1], value.shape[-1]),
            self._statistics_of(layer, key.device),
            self.scale,
            output.view(-1, self.num_heads, value.shape[-1]),
        )
        return output
