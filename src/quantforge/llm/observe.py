"""How a layer sees its queries: exact keys that tell which queries attended to them.

    update() -> WatchedTensor --- models' views, repeat_kv ---> SDPA or q @ K^T -> Queries.see(q)

A `WatchedTensor` is an ordinary dense tensor with all its data, so whatever attends to it gets the
exact result; only SDPA and matmul stop to show the query first. The mask, which tells tokens from
left padding, is an argument of SDPA; eager attention adds it to what matmul returned, which is
therefore watched too, up to its softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

See = Callable[[torch.Tensor, float | None, torch.Tensor | None], None]
"""Takes a query (B, Hq, q, dim), the scale of its logits (None: 1 / sqrt(dim)) and the mask of its
attention, broadcasting to (B, Hq, q, n), where it is known."""

RECENT = 64
"""Query tokens kept for the attention mass of keys: enough to see what a text refers to."""

MASKED = -1e4
"""What is added to the logit of a masked token is below, in every dtype."""

VIEWS = frozenset(
    {
        torch.Tensor.transpose,
        torch.transpose,
        torch.Tensor.__getitem__,
        torch.Tensor.expand,
        torch.Tensor.reshape,
        torch.Tensor.contiguous,
        torch.Tensor.repeat_interleave,
        torch.repeat_interleave,
    }
)
SOFTMAXES = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax})
ADDITIONS = frozenset(
    {
        torch.add,
        torch.Tensor.add,
        torch.Tensor.add_,
        torch.Tensor.__add__,
        torch.Tensor.__radd__,
        torch.Tensor.__iadd__,
    }
)
MATMULS = frozenset({torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__})


class WatchedTensor(torch.Tensor):
    """Dense keys (B, Hkv, n, dim) that show the queries which attend to them."""

    _see: See

    @staticmethod
    def of(keys: torch.Tensor, see: See) -> WatchedTensor:
        """Return keys, sharing their memory, watched."""
        watched = keys.as_subclass(WatchedTensor)
        watched._see = see
        return watched

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # arguments of other subclasses keep their say
        with torch._C.DisableTorchFunctionSubclass():
            plain_args, plain_kwargs = tree_map_only(WatchedTensor, _plain, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if func in VIEWS and isinstance(args[0], WatchedTensor):
            return WatchedTensor.of(out, args[0]._see)
        if func is F.scaled_dot_product_attention:
            query, key, mask = (
                kwargs.get(name, args[i] if i < len(args) else None)
                for i, name in ((0, "query"), (1, "key"), (3, "attn_mask"))
            )
            if isinstance(key, WatchedTensor) and query is not None:
                key._see(query, kwargs.get("scale"), mask)
        elif func in MATMULS and isinstance(args[1], WatchedTensor):
            return WatchedLogits.of(out, args[1]._see, args[0])
        return out


class WatchedLogits(torch.Tensor):
    """`q @ K^T` of eager attention on its way to a softmax, where it shows query and mask."""

    _see: See
    _query: torch.Tensor
    _mask: torch.Tensor | None

    @staticmethod
    def of(
        logits: torch.Tensor, see: See, query: torch.Tensor, mask: torch.Tensor | None = None
    ) -> WatchedLogits:
        """Return logits, sharing their memory, watched."""
        watched = logits.as_subclass(WatchedLogits)
        watched._see, watched._query, watched._mask = see, query, mask
        return watched

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        watched: list[WatchedLogits] = []

        def plain(t: WatchedLogits) -> torch.Tensor:
            watched.append(t)
            return t.as_subclass(torch.Tensor)

        with torch._C.DisableTorchFunctionSubclass():
            plain_args, plain_kwargs = tree_map_only(WatchedLogits, plain, (args, kwargs))
            n = watched[0].shape[-1]
        out = func(*plain_args, **plain_kwargs)
        if not isinstance(out, torch.Tensor):
            return out
        see, query, mask = watched[0]._see, watched[0]._query, watched[0]._mask
        if func in ADDITIONS:
            for t in args:
                if isinstance(t, torch.Tensor) and not isinstance(t, WatchedLogits):
                    # a bias, as of positions, does not hide what a mask says
                    mask = t if mask is None else mask + t
        if func not in SOFTMAXES and out.ndim and out.shape[-1] == n:
            return WatchedLogits.of(out, see, query, mask)
        see(query, None, mask)
        return out


def _plain(t: torch.Tensor) -> torch.Tensor:
    return t.as_subclass(torch.Tensor)


def padding_of(mask: torch.Tensor, tokens: int) -> torch.Tensor | None:
    """Return how many of some new tokens are left padding: (B or 1,), None where it is not told.

    A token sees itself unless it is padding, in masks of full and of sliding-window attention.

    Args:
        mask: of the attention of the new tokens to themselves, broadcasting to (B, Hq, q, q), bool
            or added.
        tokens: q.
    """
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[2] not in (1, tokens) or mask.shape[3] != tokens:
        return None
    own = mask[:, 0, 0] if mask.shape[2] == 1 else mask[:, 0].diagonal(dim1=1, dim2=2)
    if own.dtype != torch.bool:
        own = own > MASKED
    return (own.cumsum(-1) == 0).sum(-1)


class Queries:
    """What a layer remembers of its queries: the RMS of their channels and the latest of them.

    Args:
        recent: tokens whose queries are kept for `mass`; 0: none.

    Attributes:
        padding: (B,) tokens of left padding, which count for nothing; None where no mask was seen.
    """

    def __init__(self, recent: int = 0) -> None:
        self.keep = recent
        self.scale: float | None = None
        self.padding: torch.Tensor | None = None
        self.rows: int | torch.Tensor = 0
        self.squares: torch.Tensor | None = None
        self.recent: list[torch.Tensor] = []

    def see(
        self,
        query: torch.Tensor,
        kv_heads: int,
        tokens: int,
        scale: float | None,
        mask: torch.Tensor | None = None,
        start: int = 0,
    ) -> None:
        """Take note of a query (B, Hq, tokens, dim), and of the padding that a mask shows.

        Query heads may have been folded into rows, as in (B, Hkv, q_per_kv * tokens, dim). What
        does not fit is no query: models may multiply keys by other things.

        Args:
            query: of the new tokens.
            kv_heads: key heads.
            tokens: new ones.
            scale: of the logits.
            mask: of their attention to themselves, broadcasting to (B, Hq, tokens, tokens).
            start: tokens before the new ones.
        """
        if query.ndim != 4 or query.shape[1:3].numel() % (kv_heads * tokens):
            return
        by_head = query.detach().reshape(query.shape[0], kv_heads, -1, tokens, query.shape[-1])
        self._find_padding(mask, start, tokens, len(query))
        if (real := self.real(start, tokens)) is None:
            rows: int | torch.Tensor = by_head.shape[2] * tokens
            counted = by_head
        else:
            rows = by_head.shape[2] * real.sum(-1).view(-1, 1, 1, 1)
            counted = by_head.masked_fill(~real[:, None, None, :, None], 0)
        norms = torch.linalg.vector_norm(counted, dim=(2, 3), dtype=torch.float32)
        squares = norms.square_().unsqueeze(2)
        self.squares = squares if self.squares is None else self.squares + squares
        self.rows = self.rows + rows
        self.scale = scale
        if self.keep:
            # own memory: a slice would keep the queries of the whole prompt
            latest = by_head if tokens == 1 else by_head[:, :, :, -self.keep :].clone()
            self.recent = [*self.recent, latest][-self.keep :]

    def _find_padding(self, mask: torch.Tensor | None, start: int, tokens: int, batch: int) -> None:
        """Count what a mask shows of padding, which only more padding may precede."""
        plain = type(mask) is torch.Tensor  # a CausalBias pads nothing
        found = padding_of(mask.detach(), tokens) if plain else None  # type: ignore[union-attr]
        if found is None:
            return
        found = found.expand(batch)
        if self.padding is not None:
            found = torch.where(self.padding == start, start + found, self.padding)
        elif start:  # no mask showed the first tokens: they are real
            return
        self.padding = found

    def real(self, start: int, tokens: int) -> torch.Tensor | None:
        """Return which of some tokens are no padding: (B, tokens) bool, None for all."""
        if self.padding is None:
            return None
        place = torch.arange(start, start + tokens, device=self.padding.device)
        return place >= self.padding[:, None]

    @property
    def rms(self) -> torch.Tensor | None:
        """RMS of the channels (B, Hkv, 1, dim) over query heads and tokens, float32, or None."""
        if self.squares is None:
            return None
        rows = self.rows if isinstance(self.rows, int) else self.rows.clamp_min(1)
        return (self.squares / rows).sqrt()

    def latest(self) -> torch.Tensor | None:
        """Return the kept queries (B, Hkv, q_per_kv, m, dim), or None where none was seen."""
        if not self.recent:
            return None
        latest = self.recent[0] if len(self.recent) == 1 else torch.cat(self.recent, 3)
        return latest[:, :, :, -self.keep :]

    def mass(self, keys: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the attention that the latest m queries pay to keys (B, Hkv, n, dim).

        The last of the queries belongs to the last of the keys.

        Args:
            keys: those held in full.
            real: (B, n) which of them are no padding; None for all.

        Returns:
            (B, Hkv, n) float32: the mean over queries and query heads, -1 for padding; None where
            no query was seen.

        Cost: the logits of m queries, one key head at a time: O(m n dim) operations.
        """
        queries = self.latest()
        if queries is None:
            return None
        m, n, dim = queries.shape[3], keys.shape[2], keys.shape[3]
        scale = dim**-0.5 if self.scale is None else self.scale
        token = torch.arange(n, device=keys.device)
        own = torch.arange(n - m, n, device=keys.device).clamp_min_(0)  # after a crop
        future = token > own[:, None]  # (m, n)
        mass = keys.new_empty(keys.shape[:3], dtype=torch.float32)
        counts, hidden = None, future
        if real is not None:
            counts = real[:, own].unsqueeze(-1)  # (B, m, 1)
            hidden = future | (~real[:, None, None] & counts[:, None])
        for head in range(keys.shape[1]):
            logits = queries[:, head].flatten(1, 2) @ keys[:, head].mT
            logits = logits.float().mul_(scale).unflatten(1, (-1, m))
            weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1).mean(1)
            if counts is None:
                mass[:, head] = weights.mean(1)
            else:  # queries of padding count for nothing
                mass[:, head] = (weights * counts).sum(1) / counts.sum(1).clamp_min(1)
        return mass if real is None else mass.masked_fill_(~real[:, None], -1.0)

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor t, all with the batch in front, by f(t)."""
        if self.squares is not None:
            self.squares = f(self.squares)
        self.rows = self.rows if isinstance(self.rows, int) else f(self.rows)
        self.padding = None if self.padding is None else f(self.padding)
        latest = self.latest()
        self.recent = [] if latest is None else [f(latest)]
