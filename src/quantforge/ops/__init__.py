"""Registered operators on packed codes, one folder each.

    quantize       x -> packed, scales
    dequantize     packed, scales -> x
    scores         q @ X^T
    search         the k best of q @ X^T
    mixed_search   the same where directions have different bits, by integer products
    combine        w @ X
    attention      softmax(q K^T) V, and its log-sum-exp
    decode_attention   the same for the last tokens, over pages and a dense remainder
    paged_attention    the same over rows in pages that lie anywhere
    cache_append   quantize into preallocated buffers, in place
    window_append  append to a dense window; pack the page that leaves it, in place

A folder holds `api` (the public function), `op` (schema, fake and registration), `reference`
(float64 numpy oracle) and `eager` (torch, any device). Importing this package registers all.
"""

from quantforge.ops.attention.api import attention
from quantforge.ops.cache_append.api import cache_append
from quantforge.ops.combine.api import combine
from quantforge.ops.decode_attention.api import decode_attention
from quantforge.ops.dequantize.api import dequantize
from quantforge.ops.mixed_search.api import mixed_search
from quantforge.ops.paged_attention.api import paged_attention
from quantforge.ops.quantize.api import quantize
from quantforge.ops.scores.api import scores
from quantforge.ops.search.api import search
from quantforge.ops.window_append.api import window_append

__all__ = [
    "attention",
    "cache_append",
    "combine",
    "decode_attention",
    "dequantize",
    "mixed_search",
    "paged_attention",
    "quantize",
    "scores",
    "search",
    "window_append",
]
