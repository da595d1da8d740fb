"""What a mask says, looked up once: attention without a mask runs in faster kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from quantforge.ops.checks import has_values

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the owner of the numbers, what views of it were seen to say at one of its versions."""


def is_plainly_causal(mask: torch.Tensor) -> bool:
    """Return whether query i of q sees exactly the first n - q + i + 1 of n positions.

    Args:
        mask: bool (..., q, n), True = attend.

    Returns:
        False also where nobody may look: in a trace, or while a CUDA graph is captured, which
        would hold for other numbers too.

    Cost: a pass over the mask and a synchronization, once for all layers that share it.
    """
    if not has_values(mask) or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    if mask.is_inference():  # no version tells whether it has changed
        return _look(mask)
    owner = mask if mask._base is None else mask._base
    view = (mask._version, mask.storage_offset(), tuple(mask.shape), mask.stride())
    answers: dict[Any, bool] = _known.setdefault(owner, {})
    if view not in answers:
        if any(version != mask._version for version, *_ in answers):
            answers.clear()
        answers[view] = _look(mask)
    return answers[view]


def _look(mask: torch.Tensor) -> bool:
    q, n = mask.shape[-2:]
    if q > n:
        return False
    expected = torch.ones((q, n), dtype=torch.bool, device=mask.device).tril_(n - q)
    return bool((mask == expected).all())
