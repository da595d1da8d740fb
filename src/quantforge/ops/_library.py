"""The operator library: one place that turns schema, fake and implementation into an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "quantforge"
DEVICES = ("CPU", "CUDA")

_library = torch.library.Library(NAMESPACE, "DEF")


def register(schema: str, *, fake: Callable[..., Any], eager: Callable[..., Any]) -> Any:
    """Define `quantforge::<schema>` and return the callable overload.

    `Library.define` costs a third of `torch.library.custom_op` per call and, unlike
    `triton_op`, compiles on CPU; a call sits in every layer of every decode step.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in DEVICES:
        _library.impl(name, eager, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
