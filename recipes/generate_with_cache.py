"""Generate text with any Hugging Face causal language model and a quantized KV cache.

Prints the text of the model's own cache and of a QuantForgeCache, how many tokens agree, and what
each cache takes. `--small` uses the tiny model that ships with quantforge. Asserted: the quantized
cache of a prompt that fills a few windows is smaller than the model's own.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from quantforge import QuantForgeCache

TINY = Path(__file__).parent / "assets" / "tiny-lm"


def default_prompt() -> str:
    """Return held-out Python source, long enough to be quantized."""
    return (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text("utf-8")[:6000]


def own_bytes(cache: DynamicCache) -> int:
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def generate(model, tokenizer, ids: torch.Tensor, cache: DynamicCache, new: int) -> tuple:
    """Return the new tokens and the seconds they took."""
    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return out[0, ids.shape[1] :], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="path or hub name; the shipped model if omitted")
    parser.add_argument("--prompt", help="text, or @FILE")
    parser.add_argument("--bits", default="4", help="1-8, or KEYS,VALUES as in 4,2")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="the shipped model, 16 new tokens")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()

    path = TINY if args.small or args.model is None else args.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation=args.attention
    ).to(args.device)
    prompt = default_prompt() if args.prompt is None else args.prompt
    if prompt.startswith("@"):
        prompt = Path(prompt[1:]).read_text("utf-8")
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(args.device)
    new = 16 if args.small else args.max_new_tokens
    bits = tuple(int(b) for b in args.bits.split(","))

    own = DynamicCache(config=model.config)
    ours = QuantForgeCache(
        config=model.config, bits=bits[0] if len(bits) == 1 else bits, window=args.window
    )
    expected, own_seconds = generate(model, tokenizer, ids, own, new)
    got, seconds = generate(model, tokenizer, ids, ours, new)
    length = min(len(expected), len(got))
    same = int((expected[:length] == got[:length]).int().cumprod(0).sum())
    for name, new_tokens in (("own cache", expected), (f"{args.bits} bits", got)):
        print(f"{name:12} {tokenizer.decode(new_tokens)!r}")
    print(f"\n{'cache':12} {'KiB':>10} {'seconds':>8}   {ids.shape[1]} prompt tokens, {new} new")
    print(f"{'own':12} {own_bytes(own) / 1024:10.1f} {own_seconds:8.2f}")
    name = f"{args.bits} bits"
    print(f"{name:12} {ours.nbytes / 1024:10.1f} {seconds:8.2f}   {same} tokens agree")
    if ids.shape[1] > 4 * (args.window + ours.options.page_size + ours.options.sinks):
        assert ours.nbytes < own_bytes(own), "the quantized cache is larger"


if __name__ == "__main__":
    main()
