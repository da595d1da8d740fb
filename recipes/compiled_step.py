"""Compile the decode step of a model over a quantized cache: one graph for the whole generation.

A cache with `max_cache_len` has fixed buffers and keeps its lengths on the device, so a step that
packs a page is the same graph as one that does not. Prints the time of a step, eager and compiled.
Asserted: the graph has no break, no step compiles again, and logits are those of the eager step.
`--small` uses the tiny model that ships with quantforge, and traces without generating code.

On a GPU plain `generate()` does this by itself with such a cache.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from quantforge import QuantForgeCache

TINY = Path(__file__).parent / "assets" / "tiny-lm"


@torch.no_grad()
def decode(
    model: Any, step: Callable, prompt: torch.Tensor, tokens: torch.Tensor | None, args: Any
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Return tokens (n,), their logits (n, vocabulary), seconds of the first step and of a later.

    The tokens are the most likely ones, or those given.
    """
    room = prompt.shape[1] + args.new_tokens
    cache = QuantForgeCache(model.config, bits=args.bits, max_cache_len=room)
    logits = [model(prompt, past_key_values=cache, logits_to_keep=1).logits[0]]
    chosen, seconds = [], []
    for i in range(args.new_tokens - 1):
        chosen.append(logits[-1].argmax(-1) if tokens is None else tokens[i : i + 1])
        start = time.perf_counter()
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            # a tensor of its own: a CUDA graph writes the next step's output over this one's
            logits.append(step(chosen[-1][None], past_key_values=cache).logits[0].clone())
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    packed = [int(layer.get_seq_length()) for layer in cache.layers]
    assert packed == [room - 1] * len(packed), "the cache lost a token"
    later = sorted(seconds[1:])
    return torch.cat(chosen), torch.cat(logits), seconds[0], later[len(later) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="path or hub name; the shipped model if omitted")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="shipped model, 80 tokens, trace only")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()
    path = TINY if args.small or args.model is None else args.model
    if args.small:
        args.new_tokens, args.backend = 80, "eager"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(args.device)
    text = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text("utf-8")[:800]
    prompt = tokenizer(text, return_tensors="pt").input_ids.to(args.device)
    options = {"mode": "reduce-overhead"} if args.device.startswith("cuda") else {}
    if args.backend != "inductor":
        options = {"backend": args.backend}
    step = torch.compile(model.__call__, fullgraph=True, **options)

    tokens, expected, _, eager = decode(model, model.__call__, prompt, None, args)
    _, got, first, compiled = decode(model, step, prompt, tokens, args)
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    print(f"{prompt.shape[1]} tokens and {args.new_tokens} new, {args.bits} bits, {args.device}\n")
    print(f"{'step':20} {'first, ms':>10} {'later, ms':>10}")
    print(f"{'plain':20} {'':>10} {1e3 * eager:10.2f}")
    print(f"{'compiled, ' + args.backend:20} {1e3 * first:10.0f} {1e3 * compiled:10.2f}")
    print(f"\nlogits differ by {difference:.1e} of the largest; one graph")
    assert difference < 1e-2, "the compiled step computes something else"


if __name__ == "__main__":
    main()
