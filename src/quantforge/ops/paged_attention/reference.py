"""Oracle of `paged_attention`: float64 numpy on decoded keys and values, sequence by sequence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantforge.ops.attention import reference

Array = NDArray[np.float64]


def paged_attention(
    query: Array,
    key: Array,
    value: Array,
    page_table: NDArray[np.int32],
    seqlens: NDArray[np.int32],
    scale: float,
) -> tuple[Array, Array]:
    """Return output (B, Hq, q, Dv) and log-sum-exp (B, Hq, q) for dense pages (pages, Hkv, N, D).

    Pages as in arXiv 2309.06180, section 4.1; the rest is `attention` without a mask.
    """
    found = []
    for b, n in enumerate(np.maximum(seqlens, 0)):
        token = np.arange(n)
        at = page_table[b, token // key.shape[2]], slice(None), token % key.shape[2]
        k, v = (np.swapaxes(x[at], 0, 1)[None] for x in (key, value))  # (1, Hkv, n, D)
        found.append(reference.attention(query[b : b + 1], k, v, None, False, scale))
    return np.concatenate([out for out, _ in found]), np.concatenate([lse for _, lse in found])
