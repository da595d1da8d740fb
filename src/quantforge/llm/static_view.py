"""`StaticTensor`: the keys or values of a static layer, whose lengths only the device knows.

A graph builds it from the layer's buffers in every step, after it has written them: torch.compile
does not see writes into the parts of a tensor that outlives the step (pytorch #114415). Its shape
is the capacity; what is behind the tokens held is hidden from attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from quantforge.dispatch.gradient import autocast, forward_only
from quantforge.errors import InputError, UnsupportedError
from quantforge.llm.ring import in_order_of_slots
from quantforge.ops.attention import op as attention_op
from quantforge.ops.decode_attention import op as decode_op
from quantforge.ops.merge import Partial, dense_attention, merge_partials

FIELDS = ("dense", "packed", "scales", "statistics", "counts")


class Meta(NamedTuple):
    """What a StaticTensor is besides its parts: constants only.

    Attributes:
        spec: key of the code.
        n_sinks: dense rows before the packed tokens.
        page: tokens packed at a time.
        has_shift: whether the codes are of shifted rows.
        has_equalizer: whether they are of equalized rows.
        window: tokens that a query sees, whose packed rows lie in a ring (`llm.ring`); 0: all.
        columns: of the masks of a ring; 0: as many as there is room for rows.
        n_rep: query heads of a head, once `repeat_kv` has asked for it.
        staged: rows are being repeated: the shape has the extra axis of `repeat_kv`.
    """

    spec: str
    n_sinks: int
    page: int
    has_shift: bool
    has_equalizer: bool
    window: int = 0
    columns: int = 0
    n_rep: int = 1
    staged: bool = False


HANDLERS: dict[Any, Callable[..., Any]] = {}


def on(function: Any) -> Callable[[Callable], Callable]:
    """Register the handler of a torch function on a StaticTensor."""

    def register(handler: Callable) -> Callable:
        HANDLERS[function] = handler
        return handler

    return register


class StaticTensor(torch.Tensor):
    """Keys or values (B, Hkv, capacity, dim) in the buffers of `ops.window_append.api.Window`.

    Args:
        dense: (B, Hkv, rows, dim): sinks and recent tokens.
        packed: rows or pages of codes.
        scales: of rows; (0,) of pages.
        statistics: (3, B, Hkv, 1, dim): shift, equalizer, and what the window knows of queries.
        counts: (4, B) int32: packed tokens, dense rows, ...
        meta: the rest, all of it constant.
    """

    dense: torch.Tensor
    packed: torch.Tensor
    scales: torch.Tensor
    statistics: torch.Tensor
    counts: torch.Tensor
    _meta: Meta

    def __new__(  # noqa: D102 - arguments are in the class docstring
        cls,
        dense: torch.Tensor,
        packed: torch.Tensor,
        scales: torch.Tensor,
        statistics: torch.Tensor,
        counts: torch.Tensor,
        meta: Meta,
    ) -> StaticTensor:
        batch, heads, rows, dim = dense.shape
        tokens = packed.shape[1] * meta.page if scales.ndim == 1 else packed.shape[2]
        shape = [batch, heads * meta.n_rep, meta.columns or rows + tokens, dim]
        if meta.staged:
            shape[1:2] = [heads, meta.n_rep]
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dense.dtype, device=dense.device
        )
        self.dense, self.packed, self.scales = dense, packed, scales
        self.statistics, self.counts, self._meta = statistics, counts, meta
        return self

    def _but(self, n_rep: int, staged: bool) -> StaticTensor:
        parts = (self.dense, self.packed, self.scales, self.statistics, self.counts)
        return StaticTensor(*parts, Meta(*self._meta[:-2], n_rep, staged))

    @property
    def is_paged(self) -> bool:
        """Whether the packed tokens lie in pages."""
        return self.scales.ndim == 1

    @property
    def shape_of_room(self) -> tuple[int, int]:
        """Packed tokens and dense rows for which there is room."""
        paged = self.is_paged
        tokens = self.packed.shape[1] * self._meta.page if paged else self.packed.shape[2]
        return tokens, self.dense.shape[2]

    def __tensor_flatten__(self) -> tuple[list[str], Meta]:
        return list(FIELDS), self._meta

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], meta: Meta, outer_size: Any, outer_stride: Any
    ) -> StaticTensor:
        dense, packed, scales, statistics, counts = (inner[name] for name in FIELDS)
        return StaticTensor(dense, packed, scales, statistics, counts, meta)

    @classmethod
    def __metadata_guard__(cls, ours: Meta, theirs: Meta) -> bool:
        return ours == theirs

    def _stable_hash_for_caching(self) -> str:
        return repr(self._meta)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StaticTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if (handler := HANDLERS.get(func)) is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default or func is torch.ops.aten.alias.default:
            return args[0]._but(*args[0]._meta[-2:])
        raise UnsupportedError(
            f"{func} is not defined on the keys and values of a static QuantForgeCache; load the "
            'model with attn_implementation="sdpa", or make the cache without max_cache_len'
        )


# ---- views that models apply before attention ----------------------------------------------


@on(torch.Tensor.contiguous)
def _contiguous(x: StaticTensor, **kwargs: Any) -> StaticTensor:
    return x


@on(torch.Tensor.__getitem__)
def _getitem(x: StaticTensor, key: Any) -> StaticTensor:
    """`hidden_states[:, :, None, :, :]`, the start of transformers' `repeat_kv`."""
    whole = slice(None)
    if key != (whole, whole, None, whole, whole) or x._meta.n_rep > 1:
        raise UnsupportedError(
            f"keys and values of a static QuantForgeCache cannot be indexed with {key!r}"
        )
    return x._but(1, True)


@on(torch.Tensor.expand)
def _expand(x: StaticTensor, *sizes: int) -> StaticTensor:
    if not x._meta.staged or len(sizes) != 5:
        raise UnsupportedError(
            f"keys and values of a static QuantForgeCache cannot be expanded to {sizes}"
        )
    return x._but(sizes[2], True)


@on(torch.Tensor.reshape)
def _reshape(x: StaticTensor, *shape: int) -> StaticTensor:
    if not x._meta.staged or len(shape) != 4:
        raise UnsupportedError(
            f"keys and values of a static QuantForgeCache cannot be reshaped to {shape}"
        )
    return x._but(x._meta.n_rep, False)


# ---- attention ------------------------------------------------------------------------------


# a property that returns a tensor would not be traced where a graph has built its object


def shift_of(x: StaticTensor) -> torch.Tensor | None:
    """Return the shift (B, Hkv, 1, dim), or None."""
    return x.statistics[0] if x._meta.has_shift else None


def equalizer_of(x: StaticTensor) -> torch.Tensor | None:
    """Return the equalizer (B, Hkv, 1, dim), or None."""
    return x.statistics[1] if x._meta.has_equalizer else None


@on(F.scaled_dot_product_attention)
def _attention(
    query: torch.Tensor,
    key: StaticTensor,
    value: StaticTensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """SDPA over the tokens held; the queries are the last of them."""
    if not (isinstance(key, StaticTensor) and isinstance(value, StaticTensor)):
        raise UnsupportedError("keys and values must come from the same QuantForgeCache layer")
    if dropout_p:
        raise UnsupportedError("dropout belongs to training, which packed codes do not support")
    if is_causal:
        raise UnsupportedError(
            "is_causal counts keys from the first one, and queries of a static cache are the last; "
            "pass attn_mask, or None for queries that see all tokens before them"
        )
    if attn_mask is not None and attn_mask.ndim != 4:
        raise InputError(f"attn_mask must be (B, Hq, q, n); got {tuple(attn_mask.shape)}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = autocast(query)

    def attend(q: torch.Tensor) -> torch.Tensor:
        parts = attend_static(q, key, value, attn_mask, scale)
        return (merge_partials(parts) if len(parts) > 1 else parts[0][0]).to(q.dtype)

    return forward_only(attend, query)


def attend_static(
    query: torch.Tensor,
    key: StaticTensor,
    value: StaticTensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> list[Partial]:
    """Attend to the tokens held: partial results, to be merged if there are several."""
    counts, meta = key.counts, key._meta
    if meta.window:
        tokens, rows = key.shape_of_room
        counts, mask = in_order_of_slots(
            counts, tokens, rows, meta.page, meta.window, query.shape[2], mask
        )
    if key.is_paged:
        return [_over_pages(query, key, value, counts, mask, scale, softcap)]
    return _over_rows(query, key, value, counts, mask, scale, softcap)


def _over_pages(
    query: torch.Tensor,
    key: StaticTensor,
    value: StaticTensor,
    counts: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> Partial:
    if mask is not None and mask.dtype != torch.bool:
        raise UnsupportedError(
            f"a static cache with pages takes bool masks (True = attend); got {mask.dtype}; use "
            'attn_implementation="sdpa", or layout="rows"'
        )
    query = query if query.stride(-1) == 1 else query.contiguous()
    mask = mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()
    # a mask is complete; without one a query sees all tokens up to its own
    is_causal = mask is None and query.shape[2] > 1
    out, lse = decode_op.decode_attention(
        query,
        key.packed.flatten(0, 1),
        value.packed.flatten(0, 1),
        *(None, counts[0], 0, None),
        *(key.dense, value.dense, counts[1], key.dense.shape[2], key._meta.n_sinks),
        *(mask, is_causal),
        *(shift_of(key), equalizer_of(key), shift_of(value), equalizer_of(value)),
        *(scale, softcap, 0),
        *(key._meta.spec, value._meta.spec),
    )
    return out, lse


def _over_rows(
    query: torch.Tensor,
    key: StaticTensor,
    value: StaticTensor,
    counts: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> list[Partial]:
    n_sinks, device, length = key._meta.n_sinks, query.device, query.shape[2]
    n_packed, n_dense = counts[0, :, None], counts[1, :, None]  # (B, 1)
    packed = torch.arange(key.packed.shape[2], device=device)
    dense = torch.arange(key.dense.shape[2], device=device)
    behind = torch.where(dense < n_sinks, dense, dense + n_packed)  # (B, rows)
    masks = []
    for there, place in (
        (packed < n_packed, (packed + n_sinks).expand(n_packed.shape[0], -1)),
        (dense < n_dense, behind),
    ):
        seen = there[:, None, None]
        if mask is None:
            own = n_packed + n_dense - length + torch.arange(length, device=device)  # (B, q)
            masks.append(seen & (place[:, None, None] <= own[:, None, :, None]))
            continue
        index = place.clamp_max(mask.shape[-1] - 1)[:, None, None]
        full = mask.expand(index.shape[0], -1, -1, -1)
        part = full.gather(-1, index.expand(*full.shape[:3], -1))
        hidden = False if mask.dtype == torch.bool else -torch.inf
        masks.append(torch.where(seen, part, hidden))
    window, rows = key._meta.window, key.dense.shape[2]
    all_dense = window and rows >= window - 1 + 2 * key._meta.page
    if softcap and not all_dense:
        raise UnsupportedError(
            "soft-capped attention to a static cache reads pages; use "
            'QuantForgeCache(..., layout="pages"), or a cache without max_cache_len'
        )
    dense_rows = key.dense.to(query.dtype), value.dense.to(query.dtype)
    recent = dense_attention(query, *dense_rows, masks[1], scale, softcap)
    if all_dense:
        return [recent]
    history = attention_op.attention(
        query,
        *(key.packed, key.scales, shift_of(key), equalizer_of(key)),
        *(value.packed, value.scales, shift_of(value), equalizer_of(value)),
        *(masks[0], False, scale, key._meta.spec, value._meta.spec),
    )
    return [recent, history]
