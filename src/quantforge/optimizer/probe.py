"""What cache settings cost a model: KL divergence of its next-token distributions, by passage."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from quantforge.errors import InputError
from quantforge.llm.cache import QuantForgeCache
from quantforge.llm.replay import RecordedPrompt
from quantforge.optimizer.compare import F64
from quantforge.optimizer.timing import Latency, latency


class Probe:
    """Passages that a model reads with caches of many settings.

    A passage is a prompt, read exactly, and a continuation, read at once against the packed prompt:
    its tokens see each other exactly and the prompt by its codes.

    Args:
        model: a transformers causal language model.
        passages: (B, n) tokens.
        prompt: tokens of the prompt.
        batch: passages read at a time.

    Raises:
        InputError: unless 0 < prompt < n.

    Cost: one reading of the passages with the model's own cache; what is kept are keys, values and
        queries of the prompts, and the distributions of the continuations.
    """

    def __init__(self, model: Any, passages: torch.Tensor, prompt: int, batch: int) -> None:
        if not 0 < prompt < passages.shape[1]:
            raise InputError(
                f"prompt must lie between 0 and the {passages.shape[1]} tokens of a passage; got "
                f"{prompt}"
            )
        self._model, self.tokens = model, int(passages.shape[1])
        self._parts = [
            _Part(model, ids[:, :prompt], ids[:, prompt:]) for ids in passages.split(batch)
        ]

    @property
    def prompt(self) -> RecordedPrompt:
        """The prompts of the first batch."""
        return self._parts[0].recorded

    def divergence(self, settings: Mapping[str, Any]) -> F64:
        """Return the mean KL divergence (B,) of each passage, nats, from the model's own cache.

        Args:
            settings: of QuantForgeCache.
        """
        make = partial(QuantForgeCache, self._model.config, **settings)
        return np.concatenate([part.divergence(self._model, make()) for part in self._parts])

    def latency(self, settings: Mapping[str, Any] | None) -> Latency:
        """Return the time of a step of one token after the prompts of the first batch.

        Args:
            settings: of QuantForgeCache; None: the model's own cache.
        """
        part = self._parts[0]
        cache: Any
        if settings is None:
            cache = part.recorded.own()
        else:
            cache = QuantForgeCache(self._model.config, **settings)
            part.recorded.fill(cache)
        token = part.rest[:, :1]

        def step() -> None:
            with torch.no_grad():
                self._model(token, past_key_values=cache)

        return latency(step, token.device)


class _Part:
    """A batch of passages."""

    def __init__(self, model: Any, prompt: torch.Tensor, rest: torch.Tensor) -> None:
        self.recorded, self.rest = RecordedPrompt(model, prompt), rest
        self.reference = self._read(model, self.recorded.own())

    def _read(self, model: Any, cache: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = model(self.rest, past_key_values=cache).logits
        return F.log_softmax(logits.float(), -1)

    def divergence(self, model: Any, cache: QuantForgeCache) -> F64:
        self.recorded.fill(cache)
        ours = self._read(model, cache)
        by_token = (self.reference.exp() * (self.reference - ours)).sum(-1)
        return by_token.double().mean(-1).cpu().numpy()


def passages_of(tokens: Any, device: torch.device) -> torch.Tensor:
    """Return passages (B, n) of tokens, at least four of equal length.

    Raises:
        InputError: for another shape or dtype, or fewer.
    """
    ids = torch.as_tensor(tokens)
    if ids.ndim != 2 or ids.dtype.is_floating_point or len(ids) < 4:
        raise InputError(
            "tokens must be integers of shape (passages, n) with at least 4 passages, half of "
            f"which are held out; got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    return ids.to(device)
