"""Registered operators on packed codes, one folder each.

    quantize       x -> packed, scales
    dequantize     packed, scales -> x
    scores         q @ X^T
    combine        w @ X
    attention      softmax(q K^T) V, and its log-sum-exp
    cache_append   quantize into preallocated buffers, in place

A folder holds `api` (the public function), `op` (schema, fake and registration), `reference`
(float64 numpy oracle) and `eager` (torch, any device). Importing this package registers all.
"""

from quantforge.ops.attention.api import attention
from quantforge.ops.cache_append.api import cache_append
from quantforge.ops.combine.api import combine
from quantforge.ops.dequantize.api import dequantize
from quantforge.ops.quantize.api import quantize
from quantforge.ops.scores.api import scores

__all__ = ["attention", "cache_append", "combine", "dequantize", "quantize", "scores"]
