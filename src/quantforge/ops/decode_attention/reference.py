"""Oracle of `decode_attention`: float64 numpy on decoded keys and values, row by row.

Softmax attention as in arXiv 1706.03762, section 3.2.1; logit soft-cap as in arXiv 2408.00118,
section 2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def decode_attention(
    query: Array,
    key: Array,
    value: Array,
    n_sinks: int,
    n_packed: NDArray[np.integer],
    n_dense: NDArray[np.integer],
    starts: NDArray[np.integer],
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    mask: NDArray[np.bool_] | None = None,
    is_causal: bool = True,
) -> tuple[Array, Array]:
    """Return output (B, Hq, q, Dv) and log-sum-exp (B, Hq, q).

    `key` and `value` (B, Hkv, n, dim) hold, for each row b, its sinks, its `n_packed[b]` decoded
    tokens and the rest of its `n_dense[b]` dense rows, in the order of their positions.
    """
    batch, heads, length, _ = query.shape
    q_per_kv = heads // key.shape[1]
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    lse = np.full(query.shape[:3], -np.inf)
    for b in range(batch):
        total = int(n_packed[b] + n_dense[b])
        position = np.arange(total)
        for h in range(heads):
            k, v = key[b, h // q_per_kv, :total], value[b, h // q_per_kv, :total]
            for i in range(length):
                own = total - length + i
                logits = scale * (k @ query[b, h, i])
                if softcap:
                    logits = softcap * np.tanh(logits / softcap)
                seen = position >= starts[b]
                if is_causal:
                    seen &= position <= own
                if mask is not None:
                    seen &= mask[b, h % mask.shape[1], i % mask.shape[2], :total]
                if window:
                    seen &= position > own - window
                if not seen.any():
                    continue
                peak = logits[seen].max()
                weights = np.where(seen, np.exp(logits - peak), 0.0)
                out[b, h, i] = weights @ v / weights.sum()
                lse[b, h, i] = peak + np.log(weights.sum())
    return out, lse
