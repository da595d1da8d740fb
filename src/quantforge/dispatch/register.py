"""Registration of handlers: one function for every name under which torch calls an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantforge.tensor import FUNCTIONS, OPERATORS

Handler = Callable[..., Any]


def on(*keys: Any) -> Callable[[Handler], Handler]:
    """Register a handler under torch functions and aten overloads."""

    def register(handler: Handler) -> Handler:
        for key in keys:
            table = OPERATORS if isinstance(key, torch._ops.OpOverload) else FUNCTIONS
            table[key] = handler
        return handler

    return register
