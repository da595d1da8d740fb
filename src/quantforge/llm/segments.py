"""`SegmentedTensor`: the keys or values of a cache layer, part packed and part dense.

    logical rows    [ sinks ][ packed history ............... ][ recent window ]
    held as         dense[:n_sinks]   rows or pages of codes     dense[n_sinks:]

Queries over pages run in one operator. Otherwise the packed rows are attended to by the operator
that reads codes, the dense rows by a flash kernel, and the two merge by their log-sum-exp. Tokens
of other bits are further segments. Like `QuantTensor` it refuses what it cannot do on codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, CausalVariant

from quantforge.dispatch.gradient import autocast, forward_only
from quantforge.errors import UnsupportedError
from quantforge.llm.importance import Slots
from quantforge.llm.joined import Source, parts_of, rows_of
from quantforge.llm.observe import See
from quantforge.llm.paged import PagedRows
from quantforge.llm.tiers import (
    Places,
    attend_packed,
    attend_parts,
    combine,
    decode,
    is_paged,
    logits,
    tokens_of,
    within,
)
from quantforge.ops.decode_attention import op as decode_op
from quantforge.ops.masks import is_plainly_causal
from quantforge.ops.merge import Partial, dense_attention, merge_partials
from quantforge.tensor import QuantTensor

HANDLERS: dict[Any, Callable[..., Any]] = {}


def on(*functions: Any) -> Callable[[Callable], Callable]:
    """Register a handler of torch functions on a SegmentedTensor."""

    def register(handler: Callable) -> Callable:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


class SegmentedTensor(torch.Tensor):
    """Keys or values (B, Hkv, n, dim) of which the middle rows are packed.

    Args:
        dense: (B, Hkv, m, dim), sinks first, recent rows behind them.
        source: the packed (B, Hkv, p, dim), as rows or in pages; n = m + p.
        n_sinks: rows of `dense` that come before the packed ones.
        others: packed rows of other bits, or None where there are none: tiers of tokens, or groups
            of heads.
        places: what belongs to `source` and to each of `others`; None without others.
        n_rep: query heads that share a head, once `repeat_kv` has asked for it.
        transposed: whether the last two axes are swapped.
        staged: rows are being repeated: the shape has the extra axis of `repeat_kv`.
    """

    dense: torch.Tensor
    source: Source
    others: tuple[Source | None, ...]
    places: Places
    n_packed: int
    n_sinks: int
    _see: See | None
    _n_rep: int
    _transposed: bool
    _staged: bool

    def __new__(  # noqa: D102 - arguments are in the class docstring
        cls,
        dense: torch.Tensor,
        source: Source,
        n_sinks: int,
        others: tuple[Source | None, ...] = (),
        places: Places = None,
        n_rep: int = 1,
        transposed: bool = False,
        staged: bool = False,
    ) -> SegmentedTensor:
        batch, heads, m, dim = dense.shape
        n_packed = places.alive if isinstance(places, Slots) else tokens_of(source)
        shape = [batch, heads * n_rep, m + n_packed, dim]
        if staged:
            shape[1:2] = [heads, n_rep]
        if transposed:
            shape[-2:] = shape[:-3:-1]
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dense.dtype, device=dense.device
        )
        self.dense, self.source, self.n_packed, self.n_sinks = dense, source, n_packed, n_sinks
        self.others, self.places, self._see = others, places, None
        self._n_rep, self._transposed, self._staged = n_rep, transposed, staged
        return self

    def _but(self, **changes: Any) -> SegmentedTensor:
        names = ("n_rep", "transposed", "staged")
        state = {name: getattr(self, f"_{name}") for name in names}
        held = (self.dense, self.source, self.n_sinks, self.others, self.places)
        out = SegmentedTensor(*held, **(state | changes))
        out._see = self._see
        return out

    def unseen(self) -> SegmentedTensor:
        """Return the same rows, which show no query to their layer."""
        out = self._but()
        out._see = None
        return out

    @property
    def sources(self) -> tuple[Source, ...]:
        """Packed rows of every code that has some, the ordinary one first."""
        return (self.source, *(other for other in self.others if other is not None))

    @property
    def packed(self) -> QuantTensor:
        """The packed rows of the first code, laid out as rows in one buffer."""
        return rows_of(self.source)

    @property
    def nbytes_packed(self) -> int:
        """Bytes of the rows held, packed and dense."""
        dense = self.dense.numel() * self.dense.element_size()
        return dense + sum(source.nbytes_packed for source in self.sources)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decode into one dense tensor of the same shape."""
        dtype = self.dtype if dtype is None else dtype
        dense, n = self.dense.to(dtype), self.n_sinks
        history = decode(self.sources, self.places, dtype)
        out = torch.cat([dense[:, :, :n], history, dense[:, :, n:]], dim=2)
        if self._n_rep > 1 or self._staged:
            out = out.repeat_interleave(self._n_rep, dim=1)
        if self._staged:
            out = out.unflatten(1, (-1, self._n_rep))
        return out.mT if self._transposed else out

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"SegmentedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"dense={self.dense.shape[-2]}, packed={self.n_packed})"
        )

    def split_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split the last axis (logical rows) of x into what meets the dense and packed rows."""
        start, stop = self.n_sinks, self.n_sinks + self.n_packed
        outer = (x[..., :start], x[..., stop:])
        return (torch.cat(outer, -1) if start else outer[1]), x[..., start:stop]

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
            return args[0]._but()
        raise UnsupportedError(
            f"{func} is not defined on the keys and values of a QuantForgeCache; use "
            'attn_implementation="quantforge", "sdpa" or "eager"; for a model that computes with '
            "what it cached (MLA), QuantForgeCache(config=model.config); else .dequantize()"
        )


# ---- views that models apply before attention ----------------------------------------------


@on(torch.Tensor.transpose, torch.transpose, torch.Tensor.swapaxes)
def _transpose(x: SegmentedTensor, dim0: int, dim1: int) -> SegmentedTensor:
    if x._staged or {dim0 % x.ndim, dim1 % x.ndim} != {x.ndim - 2, x.ndim - 1}:
        raise UnsupportedError(
            "only the last two axes of cached keys and values can be swapped; use "
            'attn_implementation="quantforge", "sdpa" or "eager"'
        )
    return x._but(transposed=not x._transposed)


@on(torch.Tensor.contiguous)
def _contiguous(x: SegmentedTensor, **kwargs: Any) -> SegmentedTensor:
    return x


_REPEAT_KV = (slice(None), slice(None), None, slice(None), slice(None))


@on(torch.Tensor.__getitem__)
def _getitem(x: SegmentedTensor, key: Any) -> SegmentedTensor:
    """`hidden_states[:, :, None, :, :]`, the start of transformers' `repeat_kv`."""
    if key != _REPEAT_KV or x._n_rep > 1 or x._transposed:
        raise UnsupportedError(
            f"cached keys and values cannot be indexed with {key!r}; decode with .dequantize()"
        )
    return x._but(staged=True)


@on(torch.Tensor.expand)
def _expand(x: SegmentedTensor, *sizes: int) -> SegmentedTensor:
    expected = [*x.shape[:2], sizes[2] if len(sizes) == 5 else -1, *x.shape[3:]]
    if not x._staged or list(sizes) != expected:
        raise UnsupportedError(
            f"cached keys and values cannot be expanded to {sizes}; decode with .dequantize()"
        )
    return x._but(n_rep=sizes[2])


@on(torch.Tensor.reshape)
def _reshape(x: SegmentedTensor, *shape: int) -> SegmentedTensor:
    heads, repeated = x.shape[1], x._n_rep
    if not x._staged or list(shape) != [x.shape[0], heads * repeated, *x.shape[3:]]:
        raise UnsupportedError(
            f"cached keys and values cannot be reshaped to {shape}; decode with .dequantize()"
        )
    return x._but(staged=False)


# ---- attention ------------------------------------------------------------------------------


@on(F.scaled_dot_product_attention)
def _attention(
    query: torch.Tensor,
    key: SegmentedTensor,
    value: SegmentedTensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """SDPA over both segments."""
    if not (isinstance(key, SegmentedTensor) and isinstance(value, SegmentedTensor)):
        raise UnsupportedError("keys and values must come from the same QuantForgeCache layer")
    if is_causal:
        rows = torch.arange(key.shape[-2], device=query.device)
        attn_mask = rows <= torch.arange(query.shape[-2], device=query.device)[:, None]
    if dropout_p:
        raise UnsupportedError("dropout belongs to training, which packed codes do not support")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = autocast(query)
    aligned = False
    if isinstance(attn_mask, CausalBias):
        aligned = attn_mask.variant == CausalVariant.LOWER_RIGHT
        aligned = aligned and is_fused(query, key, value, None)
        attn_mask = None if aligned else attn_mask._materialize(query.device)[None, None]
    if is_fused(query, key, value, attn_mask):
        run = partial(
            attend_pages, key=key, value=value, mask=attn_mask, scale=scale, is_causal=aligned
        )
    else:
        run = partial(attend_rows, key=key, value=value, mask=attn_mask, scale=scale)

    def attend(q: torch.Tensor) -> torch.Tensor:
        parts = run(q)
        return parts[0][0] if len(parts) == 1 else merge_partials(parts).to(q.dtype)

    out = forward_only(attend, query)
    show(query, key, scale, attn_mask)
    return out


def show(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None,
    mask: torch.Tensor | None = None,
) -> None:
    """Show a query (B, Hq, q, dim), once its attention has run, to the layer of a key."""
    see = getattr(key, "_see", None)
    if see is not None:
        see(query, scale, mask)


def attend_rows(
    query: torch.Tensor,
    key: SegmentedTensor,
    value: SegmentedTensor,
    mask: torch.Tensor | None,
    scale: float,
) -> list[Partial]:
    """Attend to the dense and to the packed rows of each tier: partial results to be merged."""
    recent, packed = (None, None) if mask is None else key.split_rows(mask)
    dense = (key.dense.to(query.dtype), value.dense.to(query.dtype))
    partials = [dense_attention(query, *dense, recent, scale)]
    keys, values = (key.source, *key.others), (value.source, *value.others)
    return [*partials, *attend_packed(query, keys, values, key.places, packed, scale)]


LOOK_ROWS = 64
"""Query rows of a key head from which a mask is looked at: a plainly causal one is left out."""


def is_fused(
    query: torch.Tensor, key: SegmentedTensor, value: SegmentedTensor, mask: torch.Tensor | None
) -> bool:
    """Return whether decode attention over pages can do this."""
    if key.places is not None or not (is_paged(key.source) and is_paged(value.source)):
        return False
    plain = mask is None or (
        mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[-1] == key.shape[-2]
    )
    return query.dtype == key.dense.dtype and plain


def attend_pages(
    query: torch.Tensor,
    key: SegmentedTensor,
    value: SegmentedTensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    is_causal: bool = False,
) -> list[Partial]:
    """Attend to all rows by the fused operator, where `is_fused` allows it: once for each part.

    is_causal: the last query is the last row; a mask may say more.
    """
    (*k_parts, k), (*v_parts, v) = parts_of(key.source), parts_of(value.source)
    assert isinstance(k, PagedRows), "checked by is_fused"
    assert isinstance(v, PagedRows), "checked by is_fused"
    if query.stride(-1) != 1:
        query = query.contiguous()
    rows = query.shape[1] // key.dense.shape[1] * query.shape[2]
    if mask is not None and rows >= LOOK_ROWS and is_plainly_causal(mask):
        mask, is_causal = None, True
    partials: list[Partial] = []
    if k_parts:
        if window:
            mask, window = within(mask, query, key.shape[-2], window), 0
        history = None
        if mask is not None:
            start = key.n_sinks
            stop = start + key.n_packed - k.n
            history, mask = (
                mask[..., start:stop],
                torch.cat([mask[..., :start], mask[..., stop:]], -1),
            )
        partials = attend_parts(query, tuple(k_parts), tuple(v_parts), history, scale, softcap)
    starts = None
    if k.first:  # the operator counts positions, and columns of the mask, from the first page
        starts = torch.full((len(query),), k.first, dtype=torch.int32, device=query.device)
        mask = None if mask is None else F.pad(mask, (k.first, 0))
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    result = decode_op.decode_attention(
        query,
        k.pages.flatten(0, 1),
        v.pages.flatten(0, 1),
        *(None, None, k.first + k.n, starts),
        *(key.dense, value.dense, None, key.dense.shape[2], key.n_sinks),
        *(mask, is_causal),
        *(k.shift, k.equalizer, v.shift, v.equalizer),
        *(scale, softcap, window),
        *(k.format.spec.key, v.format.spec.key),
    )
    return [*partials, result]


@on(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def _matmul(a: torch.Tensor, b: SegmentedTensor) -> torch.Tensor:
    """`q @ K^T` and `weights @ V` of eager attention, with repeated heads folded into rows."""
    if not isinstance(b, SegmentedTensor):
        raise UnsupportedError("cached keys and values can only stand on the right of a matmul")
    rows = autocast(a).reshape(a.shape[0], b.dense.shape[1], -1, a.shape[-1])
    product = _times_transposed if b._transposed else _times
    out = forward_only(partial(product, x=b), rows)
    if b._transposed:
        show(a, b, None)
    return out.reshape(*a.shape[:-1], out.shape[-1])


def _times_transposed(query: torch.Tensor, x: SegmentedTensor) -> torch.Tensor:
    n = x.n_sinks
    dense = query @ x.dense.mT.to(query.dtype)
    history = logits(query, x.sources, x.places)
    return torch.cat([dense[..., :n], history, dense[..., n:]], -1)


def _times(weights: torch.Tensor, x: SegmentedTensor) -> torch.Tensor:
    dense, packed = x.split_rows(weights)
    return dense @ x.dense.to(dense.dtype) + combine(packed, x.sources, x.places)
