"""How much a cache changes a model: next-token distributions, decoded token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from quantforge.errors import InputError


@dataclass(frozen=True)
class Fidelity:
    """A quantized cache against the model's own, on the same tokens.

    Attributes:
        kl_mean: mean KL divergence of the next-token distributions, nats.
        kl_p99: its 99th percentile over positions, nats.
        top1: share of positions whose most likely token agrees.
        perplexity: of the text with the quantized cache.
        reference_perplexity: of the text with the model's own cache.
        bytes_per_token: allocated by the cache at the end, slack and windows included.
        bits_per_number: the same for each key and value number.
        kl: divergence by position, the mean of the texts.
    """

    kl_mean: float
    kl_p99: float
    top1: float
    perplexity: float
    reference_perplexity: float
    bytes_per_token: float
    bits_per_number: float
    kl: tuple[float, ...] = field(repr=False)


def decode_logits(model: Any, input_ids: torch.Tensor, prompt: int, cache: Any) -> torch.Tensor:
    """Return log-probabilities (B, n - prompt, vocabulary), float32, decoding with a cache.

    The first `prompt` tokens are one forward pass; the others are fed one by one, whatever the
    model would have generated (teacher forcing). Position i predicts token prompt + i.
    """
    with torch.no_grad():
        out = model(input_ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
        logits = [out.logits[:, -1]]
        for position in range(prompt, input_ids.shape[1] - 1):
            token = input_ids[:, position : position + 1]
            logits.append(model(token, past_key_values=cache).logits[:, -1])
        return F.log_softmax(torch.stack(logits, 1).float(), -1)


def fidelity(
    model: Any,
    input_ids: torch.Tensor,
    prompt: int,
    make_cache: Callable[[], Any],
    reference: torch.Tensor | None = None,
) -> Fidelity:
    """Measure a cache by teacher-forced decoding.

    Args:
        model: a transformers causal language model.
        input_ids: (B, n) tokens.
        prompt: tokens of the first pass; the other n - prompt are decoded one by one.
        make_cache: returns a new cache.
        reference: what `decode_logits` returned for the model's own cache; computed if None.

    Raises:
        InputError: unless 0 < prompt < n.
    """
    if not 0 < prompt < input_ids.shape[1]:
        raise InputError(f"prompt must lie between 0 and {input_ids.shape[1]} tokens; got {prompt}")
    if reference is None:
        from transformers import DynamicCache

        reference = decode_logits(model, input_ids, prompt, DynamicCache(config=model.config))
    cache = make_cache()
    ours = decode_logits(model, input_ids, prompt, cache)
    by_position = (reference.exp() * (reference - ours)).sum(-1).double()
    divergence = by_position.flatten()
    nbytes, tokens = cache_bytes(cache), input_ids.numel() - len(input_ids)
    targets = input_ids[:, prompt:, None]
    return Fidelity(
        kl_mean=float(divergence.mean()),
        kl_p99=float(divergence.quantile(0.99)),
        top1=float((reference.argmax(-1) == ours.argmax(-1)).float().mean()),
        perplexity=float((-ours.gather(-1, targets).mean()).exp()),
        reference_perplexity=float((-reference.gather(-1, targets).mean()).exp()),
        bytes_per_token=nbytes / tokens,
        bits_per_number=8 * nbytes / (tokens * numbers_per_token(model.config)),
        kl=tuple(by_position.mean(0).tolist()),
    )


def cache_bytes(cache: Any) -> int:
    """Return the bytes that a cache has allocated; of transformers' own, those of its tensors."""
    if (nbytes := getattr(cache, "nbytes", None)) is not None:
        return nbytes
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    tensors = [t for t in held if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def numbers_per_token(config: Any) -> int:
    """Return the numbers that a model's keys and values have for each token."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * dim
