"""How a layer sees its queries: exact keys that tell which queries attended to them.

    update() -> WatchedTensor --- models' views, repeat_kv ---> SDPA or q @ K^T -> Queries.see(q)

A `WatchedTensor` is an ordinary dense tensor with all its data, so whatever attends to it gets the
exact result; only SDPA and matmul stop to show the query first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

See = Callable[[torch.Tensor, float | None], None]
"""Takes a query (B, Hq, q, dim) and the scale of its logits (None: 1 / sqrt(dim))."""

RECENT = 64
"""Query tokens kept for the attention mass of keys: enough to see what a text refers to."""

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
            query, key = (
                kwargs.get(name, args[i] if i < len(args) else None)
                for i, name in enumerate(("query", "key"))
            )
            if isinstance(key, WatchedTensor) and query is not None:
                key._see(query, kwargs.get("scale"))
        elif func in MATMULS and isinstance(args[1], WatchedTensor):
            args[1]._see(args[0], None)
        return out


def _plain(t: torch.Tensor) -> torch.Tensor:
    return t.as_subclass(torch.Tensor)


class Queries:
    """What a layer remembers of its queries: the RMS of their channels and the latest of them.

    Args:
        recent: tokens whose queries are kept for `mass`; 0: none.
    """

    def __init__(self, recent: int = 0) -> None:
        self.keep = recent
        self.scale: float | None = None
        self.rows = 0
        self.squares: torch.Tensor | None = None
        self.recent: list[torch.Tensor] = []

    def see(self, query: torch.Tensor, kv_heads: int, tokens: int, scale: float | None) -> None:
        """Take note of a query (B, Hq, tokens, dim).

        Query heads may have been folded into rows, as in (B, Hkv, q_per_kv * tokens, dim). What
        does not fit is no query: models may multiply keys by other things.
        """
        if query.ndim != 4 or query.shape[1:3].numel() % (kv_heads * tokens):
            return
        by_head = query.detach().reshape(query.shape[0], kv_heads, -1, tokens, query.shape[-1])
        norms = torch.linalg.vector_norm(by_head, dim=(2, 3), dtype=torch.float32)
        squares = norms.square_().unsqueeze(2)
        self.squares = squares if self.squares is None else self.squares + squares
        self.rows += by_head.shape[2] * tokens
        self.scale = scale
        if self.keep:
            # own memory: a slice would keep the queries of the whole prompt
            latest = by_head if tokens == 1 else by_head[:, :, :, -self.keep :].clone()
            self.recent = [*self.recent, latest][-self.keep :]

    @property
    def rms(self) -> torch.Tensor | None:
        """RMS of the channels (B, Hkv, 1, dim) over query heads and tokens, float32, or None."""
        return None if self.squares is None else (self.squares / self.rows).sqrt()

    def latest(self) -> torch.Tensor | None:
        """Return the kept queries (B, Hkv, q_per_kv, m, dim), or None where none was seen."""
        if not self.recent:
            return None
        latest = self.recent[0] if len(self.recent) == 1 else torch.cat(self.recent, 3)
        return latest[:, :, :, -self.keep :]

    def mass(self, keys: torch.Tensor) -> torch.Tensor | None:
        """Return the attention that the latest m queries pay to keys (B, Hkv, n, dim).

        The last of the queries belongs to the last of the keys.

        Returns:
            (B, Hkv, n) float32: the mean over queries and query heads; None where no query was
            seen.

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
        for head in range(keys.shape[1]):
            logits = queries[:, head].flatten(1, 2) @ keys[:, head].mT
            logits = logits.float().mul_(scale).unflatten(1, (-1, m))
            mass[:, head] = logits.masked_fill_(future, -torch.inf).softmax(-1).mean((1, 2))
        return mass

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor t, all with the batch in front, by f(t)."""
        if self.squares is not None:
            self.squares = f(self.squares)
        latest = self.latest()
        self.recent = [] if latest is None else [f(latest)]
