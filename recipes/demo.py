"""The tour: a tiny language model with a quantized KV cache, then a quantized docstring search.

Part 1 generates text and recalls planted secret codes with the model's own cache and with 4-, 3-
and 2-bit QuantForgeCaches. Part 2 embeds docstrings of the standard library with the same model,
stores them in 4 bits, and searches them. Claims that are asserted: 4 bits recall every code the
model's own cache recalls, in less than 40% of its bytes, and find 9 of 10 true neighbours.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

import quantforge
from quantforge import QuantForgeCache, QuantForgeConfig, QuantPipeline
from quantforge.llm.fidelity import decode_logits, fidelity

MODEL = Path(__file__).parent / "assets" / "tiny-lm"
STDLIB = Path(sysconfig.get_path("stdlib"))
HELD_OUT = "argparse.py"  # the model was not trained on it
NEEDLE = "# The secret code of {name} is {code}.\n"
RECALL = "# Recall: the secret code of {name} is"
NAMES = ("amber_fox1", "silver_key2", "quiet_river3", "green_lamp4")
CODES = ("40718", "92635", "15084", "67329")


def cache_bytes(cache: DynamicCache) -> int:
    if isinstance(cache, QuantForgeCache):
        return cache.nbytes
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def needle_prompts(tokenizer, text: str, tokens: int) -> list[torch.Tensor]:
    """Return one prompt per planted code; the codes lie at depths from the start to the end."""
    lines = text.splitlines(keepends=True)
    while len(tokenizer("".join(lines)).input_ids) > tokens:
        lines = lines[: int(len(lines) * 0.95)]
    for i, (name, code) in enumerate(zip(NAMES, CODES, strict=True)):
        lines.insert(len(lines) * (2 * i + 1) // 8, NEEDLE.format(name=name, code=code))
    prompts = ["".join(lines) + RECALL.format(name=name) for name in NAMES]
    return [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]


def show_cache(model, tokenizer, context: int) -> list[dict]:
    """Compare caches of different bits on held-out code; print a table and return its rows."""
    text = (STDLIB / HELD_OUT).read_text("utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : context + 128]
    needles = needle_prompts(tokenizer, text, context)
    own = lambda: DynamicCache(config=model.config)  # noqa: E731
    makers = {"own cache": own} | {
        f"{bits} bits": lambda bits=bits: QuantForgeCache(bits=bits) for bits in (4, 3, 2)
    }
    reference = decode_logits(model, ids, context, own())
    rows, first = [], None
    for name, make in makers.items():
        cache, start = make(), time.perf_counter()
        out = model.generate(
            ids[:, :context], max_new_tokens=96, do_sample=False, past_key_values=cache
        )[0, context:]
        seconds = time.perf_counter() - start
        first = out if first is None else first
        measured = fidelity(model, ids, context, make, reference)
        hits = 0
        for prompt, code in zip(needles, CODES, strict=True):
            reply = model.generate(
                prompt, max_new_tokens=8, do_sample=False, past_key_values=make()
            )
            hits += code in tokenizer.decode(reply[0, prompt.shape[1] :])
        rows.append(
            {
                "cache": name,
                "kib": cache_bytes(cache) / 1024,
                "kl": measured.kl_mean,
                "top1": measured.top1,
                "agree": int((out == first).int().cumprod(0).sum()),
                "needles": hits,
                "seconds": seconds,
            }
        )
        print(f"--- {name}: {tokenizer.decode(out[:40])!r}")
    print(f"\n{context} tokens of {HELD_OUT}, 96 generated (same: before the first difference)")
    print("cache         KiB   ratio        KL   top-1   same  needles  seconds")
    for row in rows:
        print(
            f"{row['cache']:9} {row['kib']:7.0f} {rows[0]['kib'] / row['kib']:6.2f}x "
            f"{row['kl']:9.5f} {row['top1']:7.3f} {row['agree']:6d} {row['needles']:6d}/4 "
            f"{row['seconds']:8.1f}"
        )
    return rows


def docstrings(limit: int) -> list[str]:
    found: list[str] = []
    for path in sorted(STDLIB.glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        texts = (ast.get_docstring(node) or "" for node in nodes)
        found += [" ".join(text.split())[:200] for text in texts if len(text) > 40]
    return list(dict.fromkeys(found))[:: max(1, len(found) // limit)][:limit]


@torch.inference_mode()
def embed(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Return unit vectors (len(texts), hidden): mean last hidden states, centred on their mean."""
    vectors = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :64]
        vectors.append(model.model(ids).last_hidden_state[0].float().mean(0))
    stacked = torch.stack(vectors)
    return torch.nn.functional.normalize(stacked - stacked.mean(0), dim=-1)


def show_search(model, tokenizer, count: int, output: Path) -> float:
    """Search compressed docstrings; print the neighbours and return recall@10 at 4 bits."""
    texts = docstrings(count)
    vectors = embed(model, tokenizer, texts)
    pipeline = QuantPipeline(vectors.shape[1], QuantForgeConfig(bits=4, equalizer=True))
    path = output / "docstrings.safetensors"
    quantforge.save_file({"docstrings": pipeline.compress(vectors)}, path)
    codes = quantforge.load_file(path)["docstrings"]

    queries = vectors[::10]
    exact, ours = (queries @ vectors.T).topk(10).indices, (queries @ codes.T).topk(10).indices
    recall = (ours[:, :, None] == exact[:, None]).any(-1).float().mean().item()
    print(
        f"\n{len(texts)} docstrings: {vectors.nbytes} bytes as fp32, {codes.nbytes_packed} packed"
    )
    print(f"in {path} ({path.stat().st_size} bytes); recall@10 against exact: {recall:.3f}")
    for index in (queries[7] @ codes.T).topk(4).indices.tolist():
        print(f"  {'query' if index == 70 else 'near '}: {texts[index][:88]}")
    return recall


def plot(rows: list[dict], path: Path) -> None:
    """Draw cache bytes against KL, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no plot (pip install 'quantforge[plot]')")
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar([row["cache"] for row in rows], [row["kib"] for row in rows], color="#4477aa")
    axes.set(ylabel="cache, KiB", title="KV cache: bytes and next-token KL (nats)")
    for i, row in enumerate(rows):
        axes.annotate(f"KL {row['kl']:.4f}", (i, row["kib"]), ha="center", va="bottom")
    figure.savefig(path)
    print(f"\nplot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="shorter context, fewer docstrings")
    parser.add_argument("--output", type=Path, default=Path("out"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).to(args.device)
    rows = show_cache(model, tokenizer, 1024 if args.small else 3072)
    plot(rows, args.output / "demo.svg")
    recall = show_search(model, tokenizer, 300 if args.small else 2000, args.output)
    assert rows[1]["needles"] == rows[0]["needles"], "4 bits lost a needle"
    assert args.small or rows[1]["kib"] < 0.4 * rows[0]["kib"], "the 4-bit cache is too large"
    assert recall > 0.9, f"recall@10 is {recall}"


if __name__ == "__main__":
    main()
