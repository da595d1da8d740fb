"""Packed rows of a sliding window in fixed buffers: a ring of pages, whose turns the device counts.

    page     0       1      2      3      4
    tokens   0..63   256..  320..  128..  192..      PACKED = 192, LAPS = 256

`window_append` writes page after page and measures shift and equalizer when it writes page 0. So
the ring goes round without that page: behind the last one comes page 1, `LAPS` grows by the tokens
passed over and `PACKED` falls by as many. A ring is long enough that what a page overwrites, and
page 0 from then on, lie before the window.

Attention takes the rows as they lie. What it needs to know of their order is in a mask, and how
many slots hold tokens: `in_order_of_slots` makes both of a mask by position.
"""

from __future__ import annotations

import torch

from quantforge.ops.window_append.api import DENSE, PACKED

LAPS, BEFORE = 4, 5
"""Rows of the counts of a ring behind those of any window: tokens passed over by going round, and
tokens that had left the window before token 0 of page 0."""


def ring_tokens(window: int, recent: int, page: int) -> int:
    """Return the packed tokens for which a ring must have room.

    Whoever sees `window` tokens sees at most so many packed ones, counted from the end of a page
    that was just written for a step of `page` tokens. Page 0 and, so that the tokens of a step can
    be removed again, another one come on top.
    """
    return (-(-max(0, window - 1 + page - recent) // page) + 2) * page


def slots_of(first: int, stop: int, pages: int) -> list[int]:
    """Return the slots of the pages [first, stop) of a ring, counted without turns."""
    return [page if page == 0 else 1 + (page - 1) % (pages - 1) for page in range(first, stop)]


def turn(counts: torch.Tensor, tokens: int, page: int) -> None:
    """Let the next page be page 1 if all slots are written: changes counts (6, B) in place."""
    passed = (counts[PACKED] >= tokens).to(counts.dtype) * (tokens - page)
    counts[PACKED].sub_(passed)
    counts[LAPS].add_(passed)


def in_order_of_slots(
    counts: torch.Tensor,
    tokens: int,
    rows: int,
    page: int,
    window: int,
    length: int,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return counts and mask for attention that takes slots for positions.

    Args:
        counts: (6, B).
        tokens: slots of the ring.
        rows: dense rows, of which `counts` says how many there are.
        page: tokens of a page.
        window: tokens that a query sees, itself included; where there is no mask.
        length: queries, the last tokens held.
        mask: (B, Hq, q, positions) bool or added, broadcasting, or None.

    Returns:
        (2, B): slots that hold tokens, dense rows; and the mask (B, Hq or 1, q, tokens + rows),
        whose columns are the slots that hold tokens, then the dense rows.
    """
    n_packed, laps = counts[PACKED, :, None], counts[LAPS, :, None]
    before, n_dense = counts[BEFORE, :, None], counts[DENSE, :, None]
    used = torch.where(laps > 0, tokens, n_packed)
    column = torch.arange(tokens + rows, device=counts.device)
    behind = column - used
    lapped = column + laps - (column >= n_packed) * (tokens - page)  # of the last turn, or this one
    packed = torch.where(column < page, column, lapped)
    held = torch.where(column < page, column < used, lapped >= page)
    place = before + torch.where(behind < 0, packed, n_packed + laps + behind)
    held = torch.where(behind < 0, held, behind < n_dense)[:, None, None]
    if mask is None:
        own = before + n_packed + laps + n_dense - length
        own = (own + torch.arange(length, device=counts.device))[:, None, :, None]
        place = place[:, None, None]
        seen = held & (place <= own) & (place > own - window)
    else:
        index = place.clamp(0, mask.shape[-1] - 1)[:, None, None].long()
        full = mask.expand(index.shape[0], -1, -1, -1)
        seen = full.gather(-1, index.expand(*full.shape[:3], -1))
        seen = torch.where(held, seen, False if mask.dtype == torch.bool else -torch.inf)
    return torch.stack([used[:, 0], n_dense[:, 0]]).to(torch.int32), seen
