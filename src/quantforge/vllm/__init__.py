"""quantforge pages as vLLM's KV cache: an attention backend that vLLM loads as a plugin.

    settings   bits, layers, statistics: what `additional_config` carries
    pages      the layout of a block, and how tokens are stored into and read from it
    attend     attention over stored tokens and the new ones
    plugin     what vLLM's entry point calls in each of its processes
    backend    vLLM's classes: backend, metadata, implementation
    layers     bits by layer
    worker     what a worker tells about itself
    check      arguments to start with, and proof that the cache is in use

`pages` and `attend` know nothing of vLLM.
"""

from quantforge.vllm.check import Report, check, options
from quantforge.vllm.settings import Settings

__all__ = ["Report", "Settings", "check", "options"]
