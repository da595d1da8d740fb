"""The table of operations on `QuantTensor`.

    compute   F.linear, matmul, SDPA: read the codes in place
    views     aten views, copies and moves: rearrange the codes
    guards    operations that must be refused with an explanation

Importing this package fills `tensor.FUNCTIONS` and `tensor.OPERATORS`.
"""

from quantforge.dispatch import compute, guards, views

__all__ = ["compute", "guards", "views"]
