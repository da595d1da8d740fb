"""The fidelity gate: several caches, one model and one text, as a table, JSON or a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantforge.errors import InputError
from quantforge.llm.cache import QuantForgeCache
from quantforge.llm.fidelity import Fidelity, decode_logits, fidelity
from quantforge.llm.needles import Needle, needle_prompts, recall
from quantforge.llm.presets import PRESETS
from quantforge.text import table

OWN = "the model's own"


@dataclass(frozen=True)
class Result:
    """What a cache did to a model.

    Attributes:
        cache: its name.
        settings: of the QuantForgeCache; None for the model's own cache.
        fidelity: of its next-token distributions; of the model's own, that of itself.
        needles: whether the code planted at each depth was recalled; empty without needles.
    """

    cache: str
    settings: Mapping[str, Any] | None
    fidelity: Fidelity
    needles: Mapping[float, bool]

    @property
    def recalled(self) -> float | None:
        """Share of planted codes recalled."""
        return sum(self.needles.values()) / len(self.needles) if self.needles else None


@dataclass(frozen=True)
class Evaluation:
    """Results of all caches; `print` it for a table.

    Attributes:
        model: its name.
        prompt: tokens of the first pass.
        decode: tokens decoded one by one.
        samples: passages of the text.
        results: the model's own cache first.
    """

    model: str
    prompt: int
    decode: int
    samples: int
    results: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        settings = {f: getattr(self, f) for f in ("model", "prompt", "decode", "samples")}
        return settings | {"results": [_plain(result) for result in self.results]}

    def __str__(self) -> str:
        head = ["cache", "KL mean", "KL p99", "top-1", "perplexity", "needles", "bytes/token",
                "bits/number"]  # fmt: skip
        rows = []
        for result in self.results:
            f, share = result.fidelity, result.recalled
            rows.append(
                [result.cache, f"{f.kl_mean:.5f}", f"{f.kl_p99:.4f}", f"{f.top1:.4f}",
                 f"{f.perplexity:.4f}", "-" if share is None else f"{share:.0%}",
                 f"{f.bytes_per_token:.0f}", f"{f.bits_per_number:.2f}"]
            )  # fmt: skip
        where = (
            f"{self.model}: {self.decode} tokens decoded one by one after {self.prompt}, "
            f"{self.samples} passages"
        )
        return f"{where}\n{table(head, rows)}"

    def plot(self, path: str | Path) -> None:
        """Draw KL over bits per number, and KL by position, into a file (needs `plot` extra)."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for result in self.results[1:]:
            f = result.fidelity
            left.plot(f.bits_per_number, f.kl_mean, "o", label=result.cache)
            right.plot(range(self.prompt, self.prompt + len(f.kl)), f.kl, label=result.cache)
        for axes, label in ((left, "bits per number, windows counted"), (right, "position")):
            axes.set(xlabel=label, ylabel="KL divergence, nats", yscale="log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        figure.suptitle(f"{self.model}, {self.decode} tokens after {self.prompt}", fontsize=10)
        figure.savefig(path)


def _plain(result: Result) -> dict[str, Any]:
    values = dataclasses.asdict(result.fidelity)
    values["kl_by_position"] = list(values.pop("kl"))
    return {
        "cache": result.cache,
        "settings": None if result.settings is None else dict(result.settings),
        **values,
        "needles": {f"{depth:g}": found for depth, found in result.needles.items()},
    }


def passages(tokenizer: Any, text: str, samples: int, length: int) -> torch.Tensor:
    """Return (samples, length) tokens, spread evenly over a text.

    Raises:
        InputError: if the text has fewer than `length` tokens.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if len(ids) < length:
        raise InputError(
            f"the text has {len(ids)} tokens and a passage needs {length} (prompt + decode); use a "
            "longer text or fewer tokens"
        )
    starts = torch.linspace(0, len(ids) - length, samples).long().tolist()
    return torch.stack([ids[start : start + length] for start in starts])


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    caches: Mapping[str, Mapping[str, Any]] = PRESETS,
    *,
    prompt: int = 1024,
    decode: int = 128,
    samples: int = 4,
    needles: bool = True,
    progress: Callable[[str], None] = lambda message: None,
) -> Evaluation:
    """Measure what quantized caches change in a model's next-token distributions.

    Every passage is decoded token by token, each time with the text's own next token (teacher
    forcing); needles are completed greedily.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        text: to take passages from.
        caches: settings of QuantForgeCache, by name.
        prompt: tokens of the first pass.
        decode: tokens decoded one by one.
        samples: passages, run as one batch.
        needles: whether to plant codes in a prompt of `prompt` tokens and ask for them.
        progress: told what is being measured.

    Raises:
        InputError: if the text is too short.
        ConfigError: for settings that do not exist.
    """
    from transformers import DynamicCache

    makers: dict[str, Callable[[], Any]] = {OWN: partial(DynamicCache, config=model.config)}
    for name, settings in caches.items():
        makers[name] = partial(QuantForgeCache, model.config, **settings)
        makers[name]()  # wrong settings are an error before anything is measured
    ids = passages(tokenizer, text, samples, prompt + decode).to(model.device)
    planted: list[Needle] = needle_prompts(tokenizer, text, prompt) if needles else []
    progress(OWN)
    reference = decode_logits(model, ids, prompt, makers[OWN]())
    results = []
    for name, make in makers.items():
        progress(name)
        measured = fidelity(model, ids, prompt, make, reference)
        found = recall(model, tokenizer, planted, make)
        results.append(Result(name, caches.get(name), measured, found))
    where = getattr(model.config, "name_or_path", "") or type(model).__name__
    return Evaluation(where, prompt, decode, samples, tuple(results))
