"""What vLLM calls in each of its processes, before any model is built."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

from quantforge.errors import UnsupportedError

OLDEST, TOO_NEW = Version("0.30"), Version("0.34")
BACKEND = "quantforge.vllm.backend.Chosen"


def register() -> None:
    """Offer the attention backend to vLLM; it is used where settings ask for it.

    The CPU platform knows one backend only, so there ours takes its place and hands models without
    settings to vLLM's own.

    Raises:
        UnsupportedError: for a version of vLLM that this was not written for.
    """
    import vllm
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from quantforge.vllm import layers

    found = Version(vllm.__version__)
    if not OLDEST <= Version(found.base_version) < TOO_NEW:
        raise UnsupportedError(
            f"quantforge {version('quantforge')} works with vLLM >= {OLDEST}, < {TOO_NEW}; found "
            f"{found}"
        )
    for name in (AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN):
        register_backend(name, BACKEND)
    layers.register()
