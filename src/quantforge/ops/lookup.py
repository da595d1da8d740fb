"""Table lookups on whole tensors, by the fastest torch function for the device."""

from __future__ import annotations

import torch

PARALLEL_NUMEL = 1 << 16
"""Below this many lookups the threads are not worth waking."""


def take(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return `table[index]` for a 1-D index.

    `index_select` is the fastest lookup on one CPU thread but never runs on several; `gather`
    from an expanded table does.
    """
    parts = _even_parts(index.numel()) if table.ndim == 1 and index.device.type == "cpu" else 1
    if parts == 1:
        return table.index_select(0, index)
    rows = index.view(parts, -1).to(torch.int64)
    return torch.gather(table.expand(parts, -1), 1, rows).flatten()


def _even_parts(numel: int) -> int:
    """Return the largest number of equal parts for the threads at hand."""
    threads = torch.get_num_threads() if numel >= PARALLEL_NUMEL else 1
    return next(parts for parts in range(threads, 0, -1) if numel % parts == 0)
