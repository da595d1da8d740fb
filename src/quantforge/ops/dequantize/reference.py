"""Oracle of `dequantize`: float64 numpy; arXiv 2504.19874, Algorithm 1, DeQuant_mse."""

from quantforge.numerics.encode import decode as dequantize

__all__ = ["dequantize"]
