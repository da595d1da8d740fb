"""How much a quantized KV cache changes a model: KL, top-1 agreement, needles, bytes.

Teacher-forced decoding of held-out text (standard-library modules that the model was not trained
on), token by token, on three versions of a model: as trained, with outlier channels, and with a
large key bias (`stress_models`). The first rows leave out what the defaults add. Results are saved
after every version of the model.

    python -m benchmarks.kv_fidelity [--model PATH] [--prompt 1024] [--decode 128]
    python -m benchmarks.kv_fidelity --caches "4 bits (default)" small --prompt 6144 --texts 2
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from benchmarks.record import save
from benchmarks.stress_models import with_key_bias, with_outlier_channels
from quantforge import QuantForgeCache
from quantforge.llm.fidelity import decode_logits, fidelity
from quantforge.llm.needles import Needle, needle_prompts, recall

MODEL = Path(__file__).parents[1] / "recipes" / "assets" / "tiny-lm"
TEXTS = ("argparse.py", "tarfile.py", "statistics.py", "difflib.py")
NAIVE: dict[str, Any] = {"sinks": 0, "window": 0, "page_size": 1}
PLAIN_CODES = {"shift": False, "equalizer": False}
CACHES: dict[str, dict[str, Any]] = {
    "4 bits, codes alone": {**NAIVE, **PLAIN_CODES},
    "4 bits, + window and sinks": PLAIN_CODES,
    "4 bits, + shift": {"equalizer": False},
    "4 bits (default)": {},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2},
    "4-bit keys, 2-bit values": {"bits": (4, 2)},
    "8 bits": {"bits": 8},
    "2 bits, 4 for important tokens": {"bits": 2, "importance": (4,), "budget": 2.4},
    "2 bits, 4 and 8 for important tokens": {"bits": 2, "importance": (4, 8), "budget": 2.4},
    **{f'preset "{name}"': {"preset": name} for name in ("quality", "balanced", "small")},
}
REACTIONS: dict[str, dict[str, Any]] = {
    "4 bits (default), 8 for heads with outliers": {"outlier_bits": 8},
    "4 bits, + shift, 8 for heads with outliers": {"equalizer": False, "outlier_bits": 8},
}
"""Measured where they are asked for: on most models there is nothing to react to."""


VERSIONS: dict[str, Callable[[Any, int], Any]] = {
    "as trained": lambda model, pairs: model,
    "outlier channels": lambda model, pairs: with_outlier_channels(model),
    "key bias": lambda model, pairs: with_key_bias(model, pairs=pairs),
}


def held_out_tokens(tokenizer: Any, length: int) -> torch.Tensor:
    """Return (texts, length) tokens from the middle of held-out modules."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    rows = []
    for name in TEXTS:
        ids = tokenizer((stdlib / name).read_text("utf-8"), return_tensors="pt").input_ids
        start = min(2000, ids.shape[1] - length)
        rows.append(ids[:, start : start + length])
    return torch.cat(rows)


def needles_of(tokenizer: Any, tokens: int) -> list[Needle]:
    """Return prompts of about `tokens` tokens that ask for codes planted at four depths."""
    text = (Path(sysconfig.get_path("stdlib")) / TEXTS[0]).read_text("utf-8")
    return needle_prompts(tokenizer, text, tokens)


def recalled(model: Any, tokenizer: Any, needles: list[Needle], make_cache: Any) -> float:
    """Return the share of planted codes that greedy decoding completes."""
    return statistics.mean(recall(model, tokenizer, needles, make_cache).values())


def bits_per_number(settings: dict[str, Any], config: Any, tokens: int) -> float:
    """Return the bits allocated for each number of Gaussian keys and values in 16 bits."""
    cache = QuantForgeCache(**settings)
    x = torch.randn(1, config.num_key_value_heads, tokens, config.head_dim).to(torch.bfloat16)
    cache.update(x, x, 0)
    return 8 * cache.nbytes / (2 * x.numel())


def measure(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    needles: list[Needle],
    prompt: int,
    caches: Mapping[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Yield one row for each cache, the model's own first."""
    own = partial(DynamicCache, config=model.config)
    reference = decode_logits(model, ids, prompt, own())
    makers: dict[str, Any] = {"the model's own": own}
    makers |= {name: partial(QuantForgeCache, **settings) for name, settings in caches.items()}
    for name, make in makers.items():
        result = fidelity(model, ids, prompt, make, reference)
        settings = caches.get(name)
        at_8k = 16.0 if settings is None else bits_per_number(settings, model.config, 8192)
        row = {
            "cache": name,
            "kl_mean": result.kl_mean,
            "kl_p99": result.kl_p99,
            "top1": result.top1,
            "perplexity": result.perplexity,
            "reference_perplexity": result.reference_perplexity,
            "bits_per_number": result.bits_per_number,
            "bits_per_number_at_8k": at_8k,
            "needles": recalled(model, tokenizer, needles, make),
        }
        print(
            f"{name:36} KL {result.kl_mean:.5f} (p99 {result.kl_p99:.4f})  top-1 "
            f"{result.top1:.4f}  needles {row['needles']:.2f}  "
            f"{result.bits_per_number:.2f} bits per number, {at_8k:.2f} at 8k",
            flush=True,
        )
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--texts", type=int, default=len(TEXTS))
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS))
    parser.add_argument("--caches", nargs="+", choices=CACHES | REACTIONS, default=list(CACHES))
    parser.add_argument("--bias-pairs", type=int, default=1, help="RoPE pairs with a key bias")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", help="what git cannot say in a copy of the working tree")
    parser.add_argument("--name", default=None, help="of the result; default kv_fidelity_MODEL")
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    settings = {
        "model_path": args.model.name,
        "prompt": args.prompt,
        "decode": args.decode,
        "texts": args.texts,
        "bias_pairs": args.bias_pairs,
    }
    ids = held_out_tokens(tokenizer, args.prompt + args.decode)[: args.texts].to(model.device)
    needles = needles_of(tokenizer, args.prompt)
    caches = {name: (CACHES | REACTIONS)[name] for name in args.caches}
    rows = []
    for version in args.versions:
        print(version, flush=True)
        changed = VERSIONS[version](model, args.bias_pairs)
        measured = measure(changed, tokenizer, ids, needles, args.prompt, caches)
        rows += [settings | {"model": version} | row for row in measured]
        name = args.name or f"kv_fidelity_{args.model.name}"
        print(save(name, args.device, rows, commit=args.commit))


if __name__ == "__main__":
    main()
