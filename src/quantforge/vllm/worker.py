"""What a worker of vLLM tells about its cache. Start with `worker_extension_cls=EXTENSION`.

vLLM only logs a plugin that fails to load, and then serves with a cache of its own. A worker that
cannot import this module, or finds the backend not registered, does not start.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from quantforge.errors import UnsupportedError
from quantforge.vllm.plugin import BACKEND

CUSTOM = AttentionBackendEnum.CUSTOM
if not CUSTOM.is_overridden() or CUSTOM.get_path() != BACKEND:
    raise UnsupportedError(
        "vLLM has not loaded quantforge's plugin, so its cache would stay uncompressed; install "
        "quantforge with its entry points (pip install quantforge), and name it in VLLM_PLUGINS "
        "if that is set"
    )


class Told:
    """Methods that vLLM adds to its workers."""

    def quantforge_report(self) -> dict[str, Any]:
        """Return what is stored, by layer, and how."""
        from quantforge.vllm.backend import PackedImpl

        found = {}
        layers = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        for name, layer in layers.items():
            cache = getattr(layer, "kv_cache", None)
            if cache is None:
                continue
            impl = getattr(layer, "impl", None)
            found[name] = {
                "bits": list(impl.bits) if isinstance(impl, PackedImpl) else None,
                "bytes": cache.numel() * cache.element_size(),
                "token_bytes": cache.shape[1] * cache.shape[3] * cache.element_size()
                if cache.ndim == 4
                else None,
                "tokens": cache.shape[0] * cache.shape[2] if cache.ndim == 4 else None,
            }
        return found
