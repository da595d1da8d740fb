"""The static layer by the same protocol: what it holds is what a dense layer was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from quantforge import QuantForgeCache
from quantforge.errors import InputError
from quantforge.llm.static import QuantForgeStaticLayer
from tests.llm.conformance import BATCH, PAGES, assert_close, dense, options, states_of
from tests.llm.models import config_of

ROOM = 400
LAYOUTS: dict[str, tuple[dict[str, Any], float]] = {"rows": ({}, 0.01), "pages": (PAGES, 0.12)}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
Layout = tuple[dict[str, Any], float]


def held(layer: QuantForgeStaticLayer) -> list[torch.Tensor]:
    """Return keys and values of the tokens held, without the room behind them."""
    return [dense(store.view()) for store in layer._stores()]


def both(layout: Layout, length: int = 90) -> tuple[QuantForgeStaticLayer, DynamicLayer]:
    pair = QuantForgeStaticLayer(options(**layout[0]), ROOM), DynamicLayer()
    for layer in pair:
        layer.update(*states_of(length))
    return pair


def step(layout: Layout, pair: Any, n: int, seed: int, batch: int = BATCH) -> None:
    ours, theirs = pair
    for layer in pair:
        layer.update(*states_of(n, seed=seed, batch=batch))
    assert int(ours.get_seq_length()) == theirs.get_seq_length()
    assert_close(held(ours), (theirs.keys, theirs.values), layout[1])


@each_layout
def test_updates(layout: Layout) -> None:
    pair = QuantForgeStaticLayer(options(**layout[0]), ROOM), DynamicLayer()
    for seed, n in enumerate((60, 1, 1, 30, 1, 5, 100, 1)):
        step(layout, pair, n, seed)
    with pytest.raises(InputError, match="room"):
        pair[0].update(*states_of(ROOM))


@each_layout
def test_attributes_are_theirs(layout: Layout) -> None:
    """Those of transformers' static layer; but ours can be cropped."""
    ours, _ = both(layout)
    theirs = StaticLayer(max_cache_len=ROOM)
    theirs.update(*states_of(90))
    for name in ("is_sliding", "is_compileable", "supports_early_init", "is_initialized"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.is_croppable
    assert ours.get_max_length() == theirs.get_max_length() == ROOM
    for name in ("max_cache_len", "dtype", "device"):
        assert getattr(ours, name) == getattr(theirs, name), name


@each_layout
@pytest.mark.parametrize("removed", [0, 1, 16, 37, 61, 88, 90])
def test_crop(layout: Layout, removed: int) -> None:
    ours, theirs = both(layout)
    before = held(ours)
    for layer in (ours, theirs):
        if removed < 90 or layer is ours:
            layer.crop(-removed)
    assert int(ours.get_seq_length()) == 90 - removed
    if removed == 90:
        theirs = DynamicLayer()
    else:
        for a, b in zip(held(ours), before, strict=True):
            torch.testing.assert_close(a, b[:, :, : 90 - removed], rtol=0, atol=1e-6)
    for seed, n in enumerate((1, 40, 1)):
        step(layout, (ours, theirs), n, seed)


@each_layout
@pytest.mark.parametrize(
    ("name", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_batch_operations(layout: Layout, name: str, argument: Any, rows: list[int]) -> None:
    ours, theirs = both(layout)
    before = held(ours)
    for layer in (ours, theirs):
        getattr(layer, name)(argument)
    assert all(torch.equal(a, b[rows]) for a, b in zip(held(ours), before, strict=True))
    for seed, n in enumerate((1, 40, 1)):
        step(layout, (ours, theirs), n, seed, len(rows))


@each_layout
def test_reset_keeps_the_buffers(layout: Layout) -> None:
    ours, _ = both(layout)
    first, addresses = held(ours), [t.data_ptr() for t in ours._window]
    ours.reset()
    assert int(ours.get_seq_length()) == 0
    ours.update(*states_of(90))
    assert [t.data_ptr() for t in ours._window] == addresses
    assert all(torch.equal(a, b) for a, b in zip(held(ours), first, strict=True))


@each_layout
def test_offload_and_prefetch(layout: Layout) -> None:
    ours, theirs = both(layout)
    before = held(ours)
    ours.offload()
    ours.prefetch()
    assert all(torch.equal(a, b) for a, b in zip(held(ours), before, strict=True))
    step(layout, (ours, theirs), 1, 0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_caches_answer_as_a_static_cache(family: str) -> None:
    config = config_of(family)
    pair = (
        QuantForgeCache(config, max_cache_len=ROOM, sinks=4, window=16, page_size=8),
        StaticCache(config=config, max_cache_len=ROOM),
    )
    for filled in (False, True):
        if filled:
            for cache in pair:
                for layer in range(2):
                    cache.update(*states_of(60), layer)
        ours, theirs = pair
        for name in ("is_compileable", "is_sliding", "is_initialized"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert len(ours) == len(theirs)
        for layer in range(2):
            assert int(ours.get_seq_length(layer)) == int(theirs.get_seq_length(layer))
            assert int(ours.get_query_offset(layer)) == int(theirs.get_query_offset(layer))
            assert ours.get_max_length(layer) == theirs.get_max_length(layer)
    pair[0].reset()
    assert int(pair[0].get_seq_length()) == 0
