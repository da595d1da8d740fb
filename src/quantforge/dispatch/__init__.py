"""The table of operations on `QuantTensor`.

    views, join      rearrange the codes
    copies           copy, move and write them
    compute          linear and matmul, read them in place
    attention        SDPA, likewise
    guards           what torch would get silently wrong

    register, layout, gradient      what the handlers are made of

Importing this package fills `tensor.FUNCTIONS` and `tensor.OPERATORS`.
"""

from quantforge.dispatch import attention, compute, copies, guards, join, views

__all__ = ["attention", "compute", "copies", "guards", "join", "views"]
