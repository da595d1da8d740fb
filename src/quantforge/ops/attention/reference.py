"""Oracle of `attention`: float64 numpy on decoded keys and values.

Softmax attention as in arXiv 1706.03762, section 3.2.1, on vectors decoded by arXiv 2504.19874,
Algorithm 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def attention(
    query: Array, key: Array, value: Array, mask: NDArray | None, is_causal: bool, scale: float
) -> tuple[Array, Array]:
    """Return output (B, Hq, q, Dv) and log-sum-exp (B, Hq, q) for dense K, V of Hkv heads."""
    q_per_kv = query.shape[1] // key.shape[1]
    key, value = (np.repeat(t, q_per_kv, axis=1) for t in (key, value))
    logits = scale * (query @ np.swapaxes(key, -1, -2))
    if mask is not None:
        logits = np.where(mask, logits, -np.inf) if mask.dtype == bool else logits + mask
    if is_causal:
        q, n = logits.shape[-2:]
        logits = np.where(np.arange(n) > np.arange(q)[:, None], -np.inf, logits)
    with np.errstate(divide="ignore", invalid="ignore"):
        peak = logits.max(axis=-1, keepdims=True, initial=-np.inf)
        weights = np.exp(logits - np.where(np.isfinite(peak), peak, 0.0))
        mass = weights.sum(axis=-1, keepdims=True)
        lse = np.log(mass)[..., 0] + np.where(np.isfinite(peak), peak, 0.0)[..., 0]
        out = np.where(mass > 0, weights @ value / mass, 0.0)
    return out, lse
