"""Public `attention`: validation, then the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantforge.errors import InputError
from quantforge.ops._library import Impl, run
from quantforge.ops.attention import op
from quantforge.ops.checks import check_floating, check_last_dim, check_packed, check_statistic
from quantforge.spec import QuantSpec


class Packed(NamedTuple):
    """Packed keys or values with what decoding them needs.

    Attributes:
        packed: (B, Hkv, n, row_bytes) uint8.
        scales: (B, Hkv, n, 1) or (B, Hkv, n, 2).
        spec: the code.
        shift: (dim,) or broadcasting (..., 1, dim), or None.
        equalizer: likewise.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    spec: QuantSpec
    shift: torch.Tensor | None = None
    equalizer: torch.Tensor | None = None


def attention(
    query: torch.Tensor,
    key: Packed,
    value: Packed,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over packed keys and values: `softmax(scale * q K^T + mask) V`.

    Args:
        query: (B, Hq, q, dim) float tensor; Hq is a multiple of Hkv.
        key: n packed keys for each of Hkv heads.
        value: as many packed values; dim and bits may differ from the keys'.
        mask: broadcasts to (B, Hq, q, n); bool (True = attend) or added to the logits.
        is_causal: query i sees keys 0..i only (aligned at the upper left, as in torch SDPA).
        scale: of the logits; 1 / sqrt(dim) if None.
        impl: "auto" takes the fastest backend that supports the call; a named one never falls back.

    Returns:
        output (B, Hq, q, value dim) and log-sum-exp (B, Hq, q, natural log), both float32, ready
        to be merged with other segments. A query that sees no key gives 0 and -inf.

    Raises:
        InputError: for shapes or dtypes that do not fit.
        UnsupportedError: if a named backend cannot run the call.

    Source: arXiv 1706.03762, section 3.2.1; arXiv 2504.19874, Algorithm 1.
    Cost: reads the codes of K and V once; extra memory is a few tiles.
    """
    check_floating("query", query)
    check_last_dim("query", query, key.spec.dim)
    for name, operand in (("key", key), ("value", value)):
        check_packed(name, operand.packed, operand.scales, operand.spec)
        shape = torch.Size((*operand.packed.shape[:-1], operand.spec.dim))
        check_statistic(f"the shift of {name}", operand.shift, shape)
        check_statistic(f"the equalizer of {name}", operand.equalizer, shape)
    _check_shapes(query, key.packed, value.packed, mask)
    arguments = (
        query,
        key.packed,
        key.scales,
        key.shift,
        key.equalizer,
        value.packed,
        value.scales,
        value.shift,
        value.equalizer,
        mask,
        is_causal,
        key.spec.dim**-0.5 if scale is None else scale,
        key.spec.key,
        value.spec.key,
    )
    return op.attention(*arguments) if impl == "auto" else run("attention", impl, *arguments)


def _check_shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 4 or key.ndim != 4 or key.shape[:3] != value.shape[:3]:
        raise InputError(
            "query must be (B, Hq, q, dim), key and value packed (B, Hkv, n, bytes) of the same "
            f"B, Hkv and n; got {shapes}"
        )
    if query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1]:
        raise InputError(f"batch must agree and Hq be a multiple of Hkv; got {shapes}")
    if mask is None:
        return
    target = torch.Size((*query.shape[:3], key.shape[2]))
    try:
        fits = 1 <= mask.ndim <= 4 and torch.broadcast_shapes(mask.shape, target) == target
    except RuntimeError:
        fits = False
    if not fits or mask.shape[-1] != target[-1]:
        raise InputError(
            f"mask must broadcast to {tuple(target)} with all of its last axis; "
            f"got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise InputError(f"mask must be bool or floating point; got {mask.dtype}")
