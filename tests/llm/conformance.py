"""What the conformance tests share: the layers compared, and which test calls which name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantforge.llm.latent import LatentLayer
from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig
from quantforge.llm.segments import SegmentedTensor
from quantforge.llm.sliding import QuantForgeSlidingLayer

COVERED: dict[str, str] = {}
"""Public name -> the test that calls it on both."""


def covers(*names: str) -> Callable[[Callable], Callable]:
    def register(test: Callable) -> Callable:
        COVERED.update(dict.fromkeys(names, test.__name__))
        return test

    return register


# ---- the layers compared ---------------------------------------------------------------------

BATCH, HEADS, DIM = 3, 2, 64


@dataclass(frozen=True)
class Kind:
    """A layer of ours, the one of transformers that it stands in for, and their largest error."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    error: float
    heads: int = HEADS


def options(**settings: Any) -> CacheConfig:
    return CacheConfig(**({"sinks": 4, "window": 16, "page_size": 8, "bits": 8} | settings))


PAGES = {"layout": "pages", "bits": 4}
KINDS: dict[str, Kind] = {
    "rows": Kind(lambda: QuantForgeLayer(options()), DynamicLayer, 0.01),
    "pages": Kind(lambda: QuantForgeLayer(options(**PAGES)), DynamicLayer, 0.12),
    "tiers": Kind(
        lambda: QuantForgeLayer(options(bits=4, importance=(8,), budget=5.5)), DynamicLayer, 0.12
    ),
    "latent": Kind(lambda: LatentLayer(options(), DIM), DynamicLayer, 0.01, heads=1),
    "sliding rows": Kind(
        lambda: QuantForgeSlidingLayer(options(), 40),
        lambda: DynamicSlidingWindowLayer(sliding_window=40),
        0.01,
    ),
    "sliding pages": Kind(
        lambda: QuantForgeSlidingLayer(options(**PAGES), 40),
        lambda: DynamicSlidingWindowLayer(sliding_window=40),
        0.12,
    ),
    "sliding dense": Kind(
        lambda: QuantForgeSlidingLayer(options(), 12),
        lambda: DynamicSlidingWindowLayer(sliding_window=12),
        0.0,
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def states_of(n: int, heads: int = HEADS, seed: int = 0, batch: int = BATCH) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, n, DIM, generator=generator) for _ in range(2))


def dense(x: torch.Tensor) -> torch.Tensor:
    return x.dequantize() if isinstance(x, SegmentedTensor) else x.as_subclass(torch.Tensor)


def content(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return dense(layer.keys), dense(layer.values)


def assert_close(ours: Any, theirs: Any, error: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        a = dense(a)
        assert a.shape == b.shape
        assert (a - b).norm() <= error * b.norm()


def both(kind: Kind, length: int = 60, record: bool = False) -> tuple[Any, Any]:
    pair = kind.ours(), kind.theirs()
    for layer in pair:
        if record and hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
        layer.update(*states_of(length, kind.heads))
    return pair


def step(kind: Kind, pair: tuple[Any, Any], n: int, seed: int, batch: int = BATCH) -> None:
    """Update both and compare all that an update is followed by."""
    ours, theirs = pair
    assert ours.get_mask_sizes(n) == theirs.get_mask_sizes(n)
    visible = ours.get_mask_sizes(n)[0]
    states = states_of(n, kind.heads, seed, batch)
    returned, expected = ours.update(*states), theirs.update(*states)
    is_first = theirs.get_seq_length() == n
    if getattr(theirs, "record_past", False) and not is_first:
        # before 5.20 they return all they recorded, which no mask fits
        expected = [x[:, :, -visible:] for x in expected]
    assert_close(returned, expected, kind.error)
    if not is_first:
        assert returned[0].shape[2] == visible
    for x, new in zip(returned, states, strict=True):
        assert torch.equal(dense(x)[:, :, -n:], new), "new tokens are exact"
    assert ours.get_seq_length() == theirs.get_seq_length()
