"""One batch of rows, for the map functions of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantforge.config import QuantForgeConfig
from quantforge.errors import InputError
from quantforge.pipeline import QuantPipeline


def encode_batch(
    batch: Mapping[str, Any], column: str, config: QuantForgeConfig | None = None
) -> dict[str, np.ndarray]:
    """Replace a column of vectors by its codes.

    Args:
        batch: columns of equal length; `batch[column]` is (n, dim) floats, or n lists of floats.
        column: of the vectors.
        config: the code, without shift and equalizer, which would differ between batches.

    Returns:
        The other columns, and `<column>.packed` (n, width) uint8 and `<column>.scales` (n, 1 or 2)
        of the config's scale dtype: the arrays that a quantforge file holds.

    Raises:
        InputError: if there is no such column, its vectors do not fit, or the config measures the
            data.
    """
    config = QuantForgeConfig() if config is None else config
    if config.shift or config.equalizer:
        raise InputError(
            "shift and equalizer are measured on the data, and batches would get different ones; "
            "use a config without them"
        )
    if column not in batch:
        raise InputError(f"there is no column {column!r}; the batch has {sorted(batch)}")
    x = batch[column]
    if not isinstance(x, np.ndarray) or x.dtype == object:
        x = np.array([np.asarray(row, np.float32) for row in x])
    if x.ndim != 2:
        raise InputError(f"column {column!r} must be (n, dim); got shape {x.shape}")
    q = QuantPipeline(x.shape[1], config).compress(np.ascontiguousarray(x), progress=False)
    kept = {name: np.asarray(values) for name, values in batch.items() if name != column}
    codes = {f"{column}.packed": q.packed.numpy(), f"{column}.scales": q.scales.numpy()}
    return kept | codes
