"""Oracle of `quantize`: the float32 definition of the codes in numpy.

Codes are compared bit for bit, so the oracle is the definition itself (`numerics.encode`) and not
a computation in float64; arXiv 2504.19874, Algorithms 1 and 2.
"""

from quantforge.numerics.encode import encode as quantize

__all__ = ["quantize"]
