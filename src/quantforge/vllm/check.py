"""Arguments that start vLLM with the packed cache, and proof that it is in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantforge.errors import UnsupportedError
from quantforge.vllm.settings import KEY, Settings

EXTENSION = "quantforge.vllm.worker.Told"


def options(device: str = "cuda", **settings: Any) -> dict[str, Any]:
    """Return keyword arguments for `vllm.LLM`, or for `vllm.EngineArgs`.

        LLM("meta-llama/Llama-3.1-8B", **quantforge.vllm.options(bits=4))

    Args:
        device: "cuda" or "cpu", where vLLM runs.
        **settings: see `Settings`.

    Raises:
        ConfigError: for settings that do not exist or have a bad value.
    """
    chosen = Settings(**settings)
    found: dict[str, Any] = {
        "additional_config": {KEY: chosen.to_dict()},
        "worker_extension_cls": EXTENSION,
    }
    if device == "cuda":
        found["attention_backend"] = "CUSTOM"
    if chosen.layers:
        found["quantization"] = "quantforge"
    return found


@dataclass(frozen=True)
class Report:
    """What vLLM holds.

    Attributes:
        tokens: capacity of the cache, in tokens.
        token_bytes: bytes of a token, all layers of all ranks.
        dense_bytes: bytes that it would take in 16 bits.
        bits: {layer: (bits of keys, bits of values)}.
    """

    tokens: int
    token_bytes: int
    dense_bytes: int
    bits: dict[str, tuple[int, int]]

    @property
    def ratio(self) -> float:
        """Tokens for each that a 16-bit cache would hold."""
        return self.dense_bytes / self.token_bytes


def check(llm: Any) -> Report:
    """Ask the workers what they store.

    Args:
        llm: a `vllm.LLM` that was started with `options`.

    Raises:
        UnsupportedError: if a layer's cache is not packed, with its name.
    """
    extension = llm.llm_engine.vllm_config.parallel_config.worker_extension_cls
    if extension != EXTENSION:
        raise UnsupportedError(
            f"the workers know nothing of quantforge (worker_extension_cls={extension!r}); start "
            "vLLM with quantforge.vllm.options(...)"
        )
    ranks = llm.collective_rpc("quantforge_report")
    bits: dict[str, tuple[int, int]] = {}
    token_bytes = 0
    for rank in ranks:
        if not rank:
            raise UnsupportedError("a worker has no attention layers with a cache")
        for name, layer in rank.items():
            if layer["bits"] is None:
                raise UnsupportedError(f"the cache of {name} is vLLM's own, not packed")
            bits[name] = tuple(layer["bits"])
            token_bytes += layer["token_bytes"]
    config = llm.llm_engine.vllm_config.model_config
    kv_heads = config.get_total_num_kv_heads()
    dense = len(bits) * kv_heads * config.get_head_size() * 2 * 2
    tokens = min(layer["tokens"] for rank in ranks for layer in rank.values())
    return Report(tokens, token_bytes, dense, bits)
