"""Demo, part 1: a tiny language model with a quantized KV cache.

Generates text and recalls planted secret codes with the model's own cache and with 4-, 3- and
2-bit QuantForgeCaches. Asserted: 4 bits recall every code the model's own cache recalls, in less
than 40% of its bytes, and leave the next-token distribution within a KL of 0.01.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from quantforge import QuantForgeCache
from quantforge.llm.fidelity import decode_logits, fidelity

MODEL = Path(__file__).parent / "assets" / "tiny-lm"
TEXT = Path(sysconfig.get_path("stdlib")) / "argparse.py"  # the model was not trained on it
NEEDLE = "# The secret code of {} is {}.\n"
RECALL = "# Recall: the secret code of {} is"
SECRETS = {
    "amber_fox1": "40718",
    "silver_key2": "92635",
    "quiet_river3": "15084",
    "green_lamp4": "67329",
}
NEW_TOKENS = 64


def cache_bytes(cache: DynamicCache) -> int:
    if isinstance(cache, QuantForgeCache):
        return cache.nbytes
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def needle_prompts(tokenizer: Any, tokens: int) -> list[torch.Tensor]:
    """Return one prompt for each secret; they are planted at depths from the start to the end."""
    lines = TEXT.read_text("utf-8").splitlines(keepends=True)
    while len(tokenizer("".join(lines)).input_ids) > tokens:
        lines = lines[: int(len(lines) * 0.95)]
    for i, (name, code) in enumerate(SECRETS.items()):
        lines.insert(len(lines) * (2 * i + 1) // 8, NEEDLE.format(name, code))
    prompts = ["".join(lines) + RECALL.format(name) for name in SECRETS]
    return [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]


def generate(model: Any, ids: torch.Tensor, cache: DynamicCache, new: int) -> torch.Tensor:
    """Return `new` greedy tokens."""
    ids = ids.to(model.device)
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=1
    )
    return out[0, ids.shape[1] :]


def compare(model: Any, tokenizer: Any, context: int) -> list[dict[str, Any]]:
    """Return one row for the model's own cache and for each number of bits."""
    ids = tokenizer(TEXT.read_text("utf-8"), return_tensors="pt").input_ids.to(model.device)
    ids, needles = ids[:, : context + NEW_TOKENS], needle_prompts(tokenizer, context)
    makers: dict[str, Callable[[], DynamicCache]] = {
        "own cache": lambda: DynamicCache(config=model.config),
        "4 bits": lambda: QuantForgeCache(bits=4),
        "3 bits": lambda: QuantForgeCache(bits=3),
        "2 bits": lambda: QuantForgeCache(bits=2),
    }
    reference = decode_logits(model, ids, context, makers["own cache"]())
    rows: list[dict[str, Any]] = []
    for name, make in makers.items():
        cache, start = make(), time.perf_counter()
        out = generate(model, ids[:, :context], cache, NEW_TOKENS)
        seconds = time.perf_counter() - start
        first = rows[0]["tokens"] if rows else out
        measured = fidelity(model, ids, context, make, reference)
        replies = [tokenizer.decode(generate(model, prompt, make(), 8)) for prompt in needles]
        hits = sum(c in reply for c, reply in zip(SECRETS.values(), replies, strict=True))
        rows.append(
            {
                "cache": name,
                "tokens": out,
                "kib": cache_bytes(cache) / 1024,
                "kl": measured.kl_mean,
                "top1": measured.top1,
                "agree": int((out == first).int().cumprod(0).sum()),
                "needles": hits,
                "seconds": seconds,
            }
        )
        print(f"{name:9} wrote {tokenizer.decode(out[:32])!r}")
    return rows


def table(rows: list[dict[str, Any]], context: int) -> str:
    head = f"{context} tokens of {TEXT.name}, {NEW_TOKENS} generated\n"
    head += "cache         KiB   ratio        KL   top-1  agree  needles  seconds\n"
    return head + "".join(
        f"{row['cache']:9} {row['kib']:7.0f} {rows[0]['kib'] / row['kib']:6.2f}x "
        f"{row['kl']:9.5f} {row['top1']:7.3f} {row['agree']:3d}/{NEW_TOKENS} "
        f"{row['needles']:6d}/{len(SECRETS)} {row['seconds']:8.1f}\n"
        for row in rows
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw cache bytes and KL, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no plot (pip install 'quantforge[plot]')")
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar([row["cache"] for row in rows], [row["kib"] for row in rows], color="#4477aa")
    axes.set(ylabel="cache, KiB", title="KV cache: KiB and next-token KL (nats)")
    for i, row in enumerate(rows):
        axes.annotate(f"KL {row['kl']:.4f}", (i, row["kib"]), ha="center", va="bottom")
    figure.savefig(path)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a shorter context")
    parser.add_argument("--output", type=Path, default=Path("out"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).to(args.device)
    rows = compare(model, tokenizer, context := 1024 if args.small else 3072)
    print("\n" + table(rows, context))
    (args.output / "demo.txt").write_text(table(rows, context))
    plot(rows, args.output / "demo.svg")
    own, four = rows[:2]
    assert four["needles"] >= own["needles"], "4 bits lost a needle"
    assert four["kl"] < 0.01, f"KL at 4 bits is {four['kl']}"
    assert args.small or four["kib"] < 0.4 * own["kib"], "the 4-bit cache is too large"


if __name__ == "__main__":
    main()
