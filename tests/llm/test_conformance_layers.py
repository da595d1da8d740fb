"""Every public name of transformers' cache layers, called on ours and on theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.cache_utils import CacheLayerMixin

from quantforge.errors import InputError, UnsupportedError
from quantforge.llm.layer import crop_takes_lengths
from tests.llm.conformance import (
    BATCH,
    DIM,
    KINDS,
    Kind,
    assert_close,
    both,
    content,
    covers,
    dense,
    each_kind,
    states_of,
    step,
)


@covers("update", "get_seq_length", "get_mask_sizes", "lazy_initialization")
@each_kind
def test_updates_return_what_theirs_return(kind: Kind) -> None:
    pair = kind.ours(), kind.theirs()
    for layer in pair:
        assert layer.get_seq_length() == 0
        assert layer.get_mask_sizes(7) == (7, 0)
    for seed, n in enumerate((60, 1, 1, 30, 1, 5, 100, 1)):
        step(kind, pair, n, seed)
    for layer in (kind.ours(), kind.theirs()):
        layer.lazy_initialization(*states_of(0, kind.heads))
        assert layer.get_seq_length() == 0
        layer.update(*states_of(9, kind.heads))
        assert layer.get_seq_length() == 9


@covers("get_max_length", "get_max_cache_shape")
@each_kind
def test_lengths_are_bounded_alike(kind: Kind) -> None:
    ours, theirs = both(kind)
    assert ours.get_max_length() == theirs.get_max_length()
    if hasattr(CacheLayerMixin, "get_max_cache_shape"):  # before 5.20
        assert ours.get_max_cache_shape() == theirs.get_max_cache_shape()


@covers("is_sliding", "is_compileable", "is_croppable", "supports_early_init")
@each_kind
def test_attributes_are_theirs(kind: Kind) -> None:
    """Also those that transformers sets on an object: other code may read any of them."""
    ours, theirs = both(kind)
    for name in ("is_sliding", "is_compileable", "is_croppable", "supports_early_init"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name, value in vars(theirs).items():
        assert hasattr(ours, name), name
        if not isinstance(value, torch.Tensor):
            assert getattr(ours, name) == value, name
    assert isinstance(ours, CacheLayerMixin)


@covers("crop", "activate_past_recording")
@each_kind
@pytest.mark.parametrize("removed", [0, 1, 3, 16, 21, 39])
def test_crop_keeps_the_exact_contribution_of_the_rest(kind: Kind, removed: int) -> None:
    """Also inside a page: what stays decodes to the same bits, and attention to it is the same."""
    ours, theirs = both(kind, record=True)
    before = content(ours)
    for layer in (ours, theirs):
        layer.crop(-removed)
    assert ours.get_seq_length() == theirs.get_seq_length() == 60 - removed
    after = content(ours)
    assert_close(after, (theirs.keys, theirs.values), kind.error)
    kept = after[0].shape[2]
    expected = [x[:, :, x.shape[2] - removed - kept : x.shape[2] - removed] for x in before]
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    new = states_of(2, kind.heads, seed=5)
    query = torch.randn(BATCH, 4 * kind.heads, 2, DIM, generator=torch.Generator().manual_seed(6))
    n = ours.get_mask_sizes(2)[0]
    mask = torch.ones(2, n, dtype=torch.bool).tril(n - 2)
    keys, values = ours.update(*new)
    got = F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
    whole = [torch.cat(pair, 2)[:, :, -n:] for pair in zip(expected, new, strict=True)]
    want = F.scaled_dot_product_attention(query, *whole, mask, enable_gqa=True)
    torch.testing.assert_close(dense(got), want, atol=1e-4, rtol=1e-4)
    theirs.update(*new)
    for seed, n in enumerate((1, 40, 1)):
        step(kind, (ours, theirs), n, seed)


@each_kind
def test_a_number_of_tokens_to_keep_is_taken_where_theirs_takes_it(kind: Kind) -> None:
    ours, theirs = kind.ours(), kind.theirs()
    for layer in (ours, theirs):
        layer.update(*states_of(11, kind.heads))
    if not crop_takes_lengths():
        for layer in (ours, theirs):
            with pytest.raises(ValueError, match="crop"):
                layer.crop(7)
        return
    for length in (7, 20):
        for layer in (ours, theirs):
            layer.crop(length)
        assert ours.get_seq_length() == theirs.get_seq_length() == 7


@each_kind
def test_crop_takes_a_tensor(kind: Kind) -> None:
    """As assisted decoding passes it before 5.20; no count of ours may become one."""
    ours, theirs = both(kind, record=True)
    for layer in (ours, theirs):
        layer.crop(torch.tensor(-3))
    assert type(ours.get_seq_length()) is int
    step(kind, (ours, theirs), 30, 0)
    assert ours.get_seq_length() == 87


@each_kind
def test_crop_before_the_first_token_does_nothing(kind: Kind) -> None:
    """A layer that uses the keys of another one is cropped without ever having been updated."""
    layer = kind.ours()
    layer.crop(-3)
    assert layer.get_seq_length() == 0


SLIDING = ["sliding rows", "sliding pages", "sliding dense"]


@pytest.mark.parametrize("name", SLIDING)
def test_crop_of_a_full_window_needs_its_past(name: str) -> None:
    for layer in both(KINDS[name]):
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            layer.crop(-1)
    with pytest.raises(InputError, match="at most 60"):
        both(KINDS[name], record=True)[0].crop(-61)
    late, _ = both(KINDS[name])
    late.activate_past_recording()
    late.update(*states_of(2))
    late.crop(-2)
    with pytest.raises(UnsupportedError, match="gone"):
        late.crop(-1)


BATCH_CALLS: dict[str, tuple[str, Any, list[int]]] = {
    "reorder": ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
    "one": ("batch_select_indices", torch.tensor([1]), [1]),
    "mask": ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
    "repeat": ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
}


@covers("reorder_cache", "batch_select_indices", "batch_repeat_interleave")
@each_kind
@pytest.mark.parametrize("call", BATCH_CALLS.values(), ids=BATCH_CALLS)
def test_batch_operations_move_codes(kind: Kind, call: tuple[str, Any, list[int]]) -> None:
    name, argument, rows = call
    ours, theirs = both(kind)
    before = content(ours)
    for layer in (ours, theirs):
        getattr(layer, name)(argument)
    assert all(torch.equal(a, b[rows]) for a, b in zip(content(ours), before, strict=True))
    assert_close(content(ours), (theirs.keys, theirs.values), kind.error)
    for seed, n in enumerate((1, 30, 1)):
        step(kind, (ours, theirs), n, seed, len(rows))


@covers("reset")
@each_kind
def test_reset_forgets_and_starts_anew(kind: Kind) -> None:
    ours, theirs = both(kind)
    first = content(ours)
    for layer in (ours, theirs):
        layer.reset()
    if theirs.keys is not None:  # before 5.20 they stay, as zeros
        theirs = kind.theirs()
    for layer in (ours, theirs):
        assert layer.get_seq_length() == 0
        assert layer.get_mask_sizes(3) == (3, 0)
    assert ours.keys is None
    assert ours.nbytes == 0
    step(kind, (ours, theirs), 60, 0)
    assert all(torch.equal(a, b) for a, b in zip(content(ours), first, strict=True))


@covers("offload", "prefetch")
@each_kind
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_offload_and_prefetch_lose_nothing(kind: Kind, device: str) -> None:
    ours = kind.ours()
    ours.prefetch()  # a cache that offloads asks ahead of the first token
    ours.offload()
    ours.update(*(x.to(device) for x in states_of(60, kind.heads)))
    before = [x.cpu() for x in content(ours)]
    ours.offload()
    assert {x.device.type for x in content(ours)} == {"cpu"}
    ours.prefetch()
    assert {x.device.type for x in content(ours)} == {device}
    assert all(torch.equal(a.cpu(), b) for a, b in zip(content(ours), before, strict=True))
    ours.offload()
    ours.update(*(x.to(device) for x in states_of(1, kind.heads)))
    assert ours.get_seq_length() == 61


@pytest.mark.parametrize("name", SLIDING)
def test_memory_of_windows_is_constant(name: str) -> None:
    layer = KINDS[name].ours()
    layer.update(*states_of(300))
    sizes = []
    for i in range(400):
        layer.update(*states_of(1, seed=i))
        sizes.append(layer.nbytes)
    assert len(set(sizes[200:])) == 1
    assert max(sizes[:200]) <= sizes[-1]
