"""Needles: codes planted in a text at several depths, and whether greedy decoding recalls them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantforge.errors import InputError

NEEDLE = "# The secret code of {} is {}.\n"
RECALL = "# Recall: the secret code of {} is"
SECRETS = {
    "amber_fox1": "40718",
    "silver_key2": "92635",
    "quiet_river3": "15084",
    "green_lamp4": "67329",
}
MAX_ANSWER = 8
"""Tokens decoded for an answer: five digits, and what may stand around them."""


@dataclass(frozen=True)
class Needle:
    """A prompt that asks for a planted code.

    Attributes:
        input_ids: (1, n) tokens.
        code: the answer.
        depth: where in the text it stands, 0 (begin) to 1 (end).
    """

    input_ids: torch.Tensor
    code: str
    depth: float


def needle_prompts(tokenizer: Any, text: str, tokens: int) -> list[Needle]:
    """Return prompts of about `tokens` tokens with all codes planted, one asking for each.

    Raises:
        InputError: if the text is shorter.
    """
    lines = text.splitlines(keepends=True)
    if len(tokenizer(text).input_ids) < tokens:
        raise InputError(f"needles need a text of {tokens} tokens; use a longer text or fewer")
    while len(lines) > len(SECRETS) and len(tokenizer("".join(lines)).input_ids) > tokens:
        lines = lines[: int(len(lines) * 0.97)]
    if len(lines) <= len(SECRETS):
        raise InputError(f"needles stand between lines, and {tokens} tokens hold too few of them")
    depths = [(2 * i + 1) / (2 * len(SECRETS)) for i in range(len(SECRETS))]
    places = [int(len(lines) * depth) for depth in depths]
    for place, (name, code) in sorted(zip(places, SECRETS.items(), strict=True), reverse=True):
        lines.insert(place, NEEDLE.format(name, code))
    return [
        Needle(
            tokenizer("".join(lines) + RECALL.format(name), return_tensors="pt").input_ids,
            code,
            depth,
        )
        for depth, (name, code) in zip(depths, SECRETS.items(), strict=True)
    ]


def recall(
    model: Any, tokenizer: Any, needles: Sequence[Needle], make_cache: Callable[[], Any]
) -> dict[float, bool]:
    """Return for each depth whether greedy decoding completes the code.

    The text is read once, into a new cache; each question continues a copy of it. So a quantized
    cache has packed the text before it knows the question, and answers from codes alone.
    """
    if not needles:
        return {}
    prompts = [needle.input_ids.to(model.device) for needle in needles]
    shared = _shared_tokens(prompts)
    text = make_cache()
    if shared:
        with torch.no_grad():
            model(prompts[0][:, :shared], past_key_values=text, logits_to_keep=1)
    found = {}
    for needle, ids in zip(needles, prompts, strict=True):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_ANSWER,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            past_key_values=copy.deepcopy(text),
        )
        found[needle.depth] = needle.code in tokenizer.decode(out[0, ids.shape[1] :])
    return found


def _shared_tokens(prompts: Sequence[torch.Tensor]) -> int:
    """Return how many first tokens all prompts (1, n) have in common, short of the last ones."""
    length = min(ids.shape[1] for ids in prompts) - 1
    first = torch.stack([ids[0, :length] for ids in prompts])
    return int((first == first[0]).all(0).cumprod(0).sum())
