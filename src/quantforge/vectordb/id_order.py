"""Whether ids lie in the order that a file says."""

from __future__ import annotations

import torch

from quantforge.errors import FormatError

CHUNK_ROWS = 1 << 20


def check_order(keys: torch.Tensor, order: torch.Tensor | None) -> None:
    """Check that distinct keys (n,) rise in this order (n,), or as they lie.

    Raises:
        FormatError: for an order that is another, or none at all.

    Cost: reads all keys, one after the other in this order.
    """
    last: torch.Tensor | None = None
    for start in range(0, len(keys), CHUNK_ROWS):
        rows = keys[start : start + CHUNK_ROWS]
        if order is not None:
            places = order[start : start + CHUNK_ROWS].long()
            if int(places.min()) < 0 or int(places.max()) >= len(keys):
                raise FormatError(
                    f"id_order must hold rows from 0 to {len(keys) - 1}; got "
                    f"{int(places.min())} to {int(places.max())}; the file is damaged"
                )
            rows = keys[places]
        if last is not None:
            rows = torch.cat([last, rows])
        fallen = (rows[1:] <= rows[:-1]).nonzero()
        if len(fallen):
            i = int(fallen[0])
            name = "ids without id_order" if order is None else "ids in the order of id_order"
            raise FormatError(
                f"{name} must rise; got {int(rows[i])} before {int(rows[i + 1])}; the file is "
                "damaged"
            )
        last = rows[-1:]
