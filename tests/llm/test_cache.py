"""QuantForgeCache inside transformers models, against the same codes attended to densely."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from quantforge import QuantForgeCache
from quantforge.errors import ConfigError, InputError, UnsupportedError
from quantforge.llm.fidelity import decode_logits
from quantforge.llm.segments import SegmentedTensor
from tests.llm.models import FAMILIES, SETTINGS, DenseReferenceCache, random_model

PROMPT, LENGTH = 60, 90


def tokens(batch: int = 1, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(2, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Compare log-probabilities.

    A difference in the last bit of an activation can move a later token's code to the
    neighbouring centroid, so the bound is that of one such code, not of rounding.
    """
    divergence = (reference.exp() * (reference - ours)).sum(-1)
    assert divergence.max() < 1e-3, f"KL {divergence.max():.2e}"
    assert divergence.median() < 1e-6, f"median KL {divergence.median():.2e}"


# transformers has no sdpa for Gemma-2, whose logits are soft-capped, and gpt-oss, which has sinks
MODELS = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager", "quantforge")
    if attention != "sdpa" or family not in ("gemma2", "gpt_oss")
    if attention != "quantforge" or family != "falcon"  # which chooses its classes by these names
]


@pytest.mark.parametrize(("family", "attention"), MODELS)
@pytest.mark.parametrize("with_config", [False, True])
def test_decoding_agrees_with_the_dense_reference(
    family: str, attention: str, with_config: bool
) -> None:
    model = random_model(family, attention)
    config = model.config if with_config else None
    ours, reference = QuantForgeCache(config, **SETTINGS), DenseReferenceCache(config, **SETTINGS)
    assert_same_logits(
        decode_logits(model, tokens(2), PROMPT, ours),
        decode_logits(model, tokens(2), PROMPT, reference),
    )
    packed = [layer for layer in ours.layers if isinstance(layer.keys, SegmentedTensor)]
    assert packed, "no layer holds packed keys: the test would compare dense with dense"


def test_the_prompt_attends_exactly() -> None:
    model, ids = random_model("llama"), tokens()
    with torch.no_grad():
        ours = model(ids, past_key_values=QuantForgeCache(bits=1, **SETTINGS)).logits
        exact = model(ids, past_key_values=DynamicCache()).logits
    assert torch.equal(ours, exact)


def test_eight_bits_are_nearly_exact_and_fewer_bits_lose_more() -> None:
    model = random_model("llama")
    reference = decode_logits(model, tokens(), PROMPT, DynamicCache())
    losses = []
    for bits in (8, 4, 2):
        ours = decode_logits(model, tokens(), PROMPT, QuantForgeCache(bits=bits, **SETTINGS))
        losses.append(float((reference.exp() * (reference - ours)).sum(-1).mean()))
    assert losses[0] < 1e-3
    assert losses[0] < losses[1] < losses[2]


def test_a_token_is_quantized_once() -> None:
    model, ids, cache = random_model("llama"), tokens(1, 140), QuantForgeCache(**SETTINGS)
    with torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
        before = cache.layers[0].keys.packed.packed.clone()
        shift = cache.layers[0].keys.packed.shift.clone()
        for i in range(60, 140):
            model(ids[:, i : i + 1], past_key_values=cache)
    after = cache.layers[0].keys.packed
    assert after.shape[2] > before.shape[2]
    assert torch.equal(after.packed[:, :, : before.shape[2]], before)
    assert torch.equal(after.shift, shift)


def test_layout_of_sinks_pages_and_window() -> None:
    cache = QuantForgeCache(sinks=4, window=16, page_size=8)
    x = torch.randn(1, 2, 60, 32)
    cache.update(x, x + 1, 0)
    keys = cache.layers[0].keys
    assert keys.packed.shape[2] == 40  # 60 - 4 sinks - 16 window, whole pages of 8
    assert torch.equal(keys.dense, torch.cat([x[:, :, :4], x[:, :, 44:]], 2))
    decoded = keys.dequantize()
    assert decoded.shape == x.shape
    assert (decoded - x).norm() / x.norm() < 0.12
    assert torch.equal(decoded[:, :, :4], x[:, :, :4])
    assert torch.equal(decoded[:, :, 44:], x[:, :, 44:])


def test_bits_of_keys_values_and_single_layers() -> None:
    cache = QuantForgeCache(bits=(4, 2), layers={1: {"bits": 8}}, **SETTINGS)
    x = torch.randn(1, 2, 60, 32)
    for layer in range(2):
        cache.update(x, x, layer)
    bits = [(l.keys.packed.spec.bits, l.values.packed.spec.bits) for l in cache.layers]  # noqa: E741
    assert bits == [(4, 2), (8, 8)]


def test_shift_and_equalizer_can_be_switched_off() -> None:
    cache = QuantForgeCache(shift=False, equalizer=False, **SETTINGS)
    cache.update(torch.randn(1, 2, 60, 32), torch.randn(1, 2, 60, 32), 0)
    packed = cache.layers[0].keys.packed
    assert packed.shift is None
    assert packed.equalizer is None


def test_bytes_are_those_of_the_buffers() -> None:
    cache = QuantForgeCache(bits=4, sinks=4, window=16, page_size=8)
    x = torch.randn(1, 2, 404, 64).to(torch.bfloat16)
    cache.update(x, x, 0)
    tokens_packed, buffer = 384, 4 + 16 + 8
    per_head = tokens_packed * (32 + 2) + buffer * 64 * 2 + 2 * 64 * 4  # + shift, equalizer
    assert cache.nbytes == 2 * 2 * per_head


def test_memory_is_not_shared_with_the_model() -> None:
    """A kept key must not hold a fused projection alive, nor change with it."""
    cache, x = QuantForgeCache(), torch.randn(1, 2, 10, 32)
    cache.update(x, x, 0)
    held = cache.layers[0].keys.clone()
    x.zero_()
    assert torch.equal(cache.layers[0].keys, held)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad])
def test_grad_modes_mix(first: Any, then: Any) -> None:
    model, ids, cache = random_model("llama"), tokens(), QuantForgeCache(**SETTINGS)
    with first():
        model(ids[:, :60], past_key_values=cache)
        model(ids[:, 60:61], past_key_values=cache)
    with then():
        for i in range(61, 80):
            out = model(ids[:, i : i + 1], past_key_values=cache)
    assert torch.isfinite(out.logits).all()


def test_forward_with_gradients_works_and_backward_is_refused() -> None:
    model, ids, cache = random_model("llama"), tokens(), QuantForgeCache(**SETTINGS)
    model(ids[:, :60], past_key_values=cache)
    out = model(ids[:, 60:61], past_key_values=cache)
    with pytest.raises(UnsupportedError, match="no_grad"):
        out.logits.sum().backward()


def test_autocast_and_bfloat16() -> None:
    model, ids = random_model("llama"), tokens()
    reference = decode_logits(model, ids, PROMPT, QuantForgeCache(**SETTINGS))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = decode_logits(model, ids, PROMPT, QuantForgeCache(**SETTINGS))
    half = decode_logits(model.to(torch.bfloat16), ids, PROMPT, QuantForgeCache(**SETTINGS))
    for logits in (mixed, half):
        assert (reference.argmax(-1) == logits.argmax(-1)).float().mean() > 0.8


# ---- the parts of the protocol that need no model ------------------------------------------


def filled(length: int = 60, **settings: Any) -> tuple[QuantForgeCache, torch.Tensor]:
    cache = QuantForgeCache(**(SETTINGS | settings))
    x = torch.randn(3, 2, length, 32, generator=torch.Generator().manual_seed(0))
    cache.update(x, x, 0)
    return cache, x


@pytest.mark.parametrize("removed", [0, 1, 16, 17, 40, 56, 58, 60])
def test_crop_keeps_the_codes_of_what_stays(removed: int) -> None:
    cache, _ = filled()
    before = cache.layers[0].keys.dequantize()
    cache.crop(-removed)
    assert cache.get_seq_length() == 60 - removed
    keys = cache.layers[0].keys
    kept = keys.dequantize() if isinstance(keys, SegmentedTensor) else keys
    assert torch.equal(kept, before[:, :, : 60 - removed])
    new = torch.randn(3, 2, 1, 32)
    cache.update(new, new, 0)
    assert cache.get_seq_length() == 61 - removed


def test_crop_refuses_what_it_cannot_remove() -> None:
    cache, _ = filled()
    with pytest.raises(InputError, match="at most 60"):
        cache.crop(-61)
    with pytest.raises(InputError, match="minus"):
        cache.crop(5)


def test_batch_operations_move_codes() -> None:
    for name, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ):
        cache, _ = filled()
        before = cache.layers[0].keys.dequantize()
        getattr(cache, name)(argument)
        assert torch.equal(cache.layers[0].keys.dequantize(), before[rows]), name


def test_reset_and_deepcopy() -> None:
    cache, x = filled()
    twin = copy.deepcopy(cache)
    before = cache.layers[0].keys.dequantize()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.layers[0].keys is None
    assert torch.equal(twin.layers[0].keys.dequantize(), before)
    cache.update(x, x, 0)
    assert torch.equal(cache.layers[0].keys.dequantize(), before)


def test_offload_and_prefetch_move_everything(device: torch.device) -> None:
    cache = QuantForgeCache(**SETTINGS)
    x = torch.randn(1, 2, 60, 32, device=device)
    cache.update(x, x, 0)
    before = cache.layers[0].keys.dequantize().cpu()
    cache.layers[0].offload()
    assert cache.layers[0].keys.dense.device.type == "cpu"
    assert cache.layers[0].keys.packed.device.type == "cpu"
    cache.layers[0].prefetch()
    assert cache.layers[0].keys.packed.device.type == device.type
    assert torch.equal(cache.layers[0].keys.dequantize().cpu(), before)
    cache.update(x[:, :, :1], x[:, :, :1], 0)
    assert cache.get_seq_length() == 61


def test_another_batch_is_refused_and_nothing_is_lost() -> None:
    cache, _ = filled()
    before = cache.layers[0].keys.dequantize()
    with pytest.raises(InputError, match="reset"):
        cache.update(torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32), 0)
    assert torch.equal(cache.layers[0].keys.dequantize(), before)


@pytest.mark.parametrize(
    ("keys", "values"),
    [((3, 2, 1, 32), (3, 2, 1, 16)), ((3, 2, 1, 32), (3, 2, 2, 32)), ((3, 1, 32), (3, 1, 32))],
)
def test_keys_and_values_that_do_not_fit_change_nothing(
    keys: tuple[int, ...], values: tuple[int, ...]
) -> None:
    cache, _ = filled()
    before = [cache.layers[0].keys.dequantize(), cache.layers[0].values.dequantize()]
    with pytest.raises(InputError):
        cache.update(torch.randn(keys), torch.randn(values), 0)
    assert cache.get_seq_length() == 60
    assert torch.equal(cache.layers[0].keys.dequantize(), before[0])
    assert torch.equal(cache.layers[0].values.dequantize(), before[1])


def test_mask_sizes_and_lengths() -> None:
    cache, _ = filled()
    assert cache.get_mask_sizes(5, 0) == (65, 0)
    assert cache.get_seq_length() == 60
    assert not cache.is_compileable
    assert len(cache) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "1 to 8"),
        ({"bits": (4, 4, 4)}, "pair"),
        ({"window": -1}, "window"),
        ({"page_size": 0}, "page_size"),
        ({"windw": 3}, "known are"),
        ({"layers": {0: {"bts": 3}}}, "known are"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantForgeCache(**settings)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_on_cuda(attention: str, dtype: torch.dtype) -> None:
    model = random_model("llama", attention).to("cuda", dtype)
    ids = tokens(2).cuda()
    ours = decode_logits(model, ids, PROMPT, QuantForgeCache(**SETTINGS))
    reference = decode_logits(model, ids, PROMPT, DenseReferenceCache(**SETTINGS))
    divergence = (reference.exp() * (reference - ours)).sum(-1)
    assert divergence.mean() < (1e-4 if dtype == torch.float32 else 2e-2)
