"""Heads whose channels still differ too much once they are equalized."""

from __future__ import annotations

import torch

from quantforge.llm.store import Store
from quantforge.ops.measure import equalizer_of, moments

LOUD = 4.0
"""Loudest over median channel: two bits of a channel, and from where a head has outliers."""


def loudness(rms: torch.Tensor) -> torch.Tensor:
    """Return the loudest over the median channel (..., 1) of RMS (..., dim)."""
    median = rms.median(-1, keepdim=True).values
    return rms.amax(-1, keepdim=True) / median.clamp_min(1e-30)


def loud_heads(
    store: Store, query_rms: torch.Tensor | None, real: torch.Tensor | None
) -> list[int]:
    """Return the heads with outliers in what a store is about to measure and pack.

    Waits for the device.

    Args:
        store: of keys or of values, nothing packed.
        query_rms: RMS of the channels of queries (B, Hkv, 1, dim), where they are known.
        real: (B, n_dense) dense rows that are no padding; None for all.
    """
    assert store.dense is not None, "rows that are due are held"
    start, options = store.candidates().start, store.options
    real = None if real is None else real[:, None, start:]
    mean, rms = moments(store.dense[:, :, start : store.n_dense], real)
    if not options.shift:
        rms = (rms.square() + mean.square()).sqrt()
    if options.equalizer:
        rms = rms / equalizer_of(rms, query_rms)
    loud = (loudness(rms) >= LOUD).any(0).flatten()
    return [head for head, is_loud in enumerate(loud.tolist()) if is_loud]
