"""How much a quantized KV cache changes a model: KL, top-1 agreement, needles, bytes.

Teacher-forced decoding of held-out text (standard-library modules that the model was not trained
on), token by token, on three versions of a model: as trained, with outlier channels, and with a
large key bias (`stress_models`). The first rows leave out what the defaults add.

    python -m benchmarks.kv_fidelity [--model PATH] [--prompt 1024] [--decode 128]
"""

from __future__ import annotations

import argparse
import sysconfig
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
}
NEEDLE = "# The secret code of {} is {}.\n"
RECALL = "# Recall: the secret code of {} is"
SECRETS = {
    "amber_fox1": "40718",
    "silver_key2": "92635",
    "quiet_river3": "15084",
    "green_lamp4": "67329",
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


def needle_prompts(tokenizer: Any, tokens: int) -> list[tuple[torch.Tensor, str]]:
    """Return prompts of about `tokens` tokens that ask for codes planted at four depths."""
    text = (Path(sysconfig.get_path("stdlib")) / TEXTS[0]).read_text("utf-8")
    lines = text.splitlines(keepends=True)
    while len(tokenizer("".join(lines)).input_ids) > tokens:
        lines = lines[: int(len(lines) * 0.97)]
    for i, (name, code) in enumerate(SECRETS.items()):
        lines.insert(len(lines) * (2 * i + 1) // (2 * len(SECRETS)), NEEDLE.format(name, code))
    prompts = ["".join(lines) + RECALL.format(name) for name in SECRETS]
    encoded = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    return list(zip(encoded, SECRETS.values(), strict=True))


def recalled(model: Any, tokenizer: Any, prompts: list, make_cache: Any) -> float:
    """Return the share of planted codes that greedy decoding completes."""
    hits = 0
    for ids, code in prompts:
        out = model.generate(
            ids.to(model.device), max_new_tokens=8, do_sample=False, pad_token_id=1,
            past_key_values=make_cache(),
        )  # fmt: skip
        hits += code in tokenizer.decode(out[0, ids.shape[1] :])
    return hits / len(prompts)


def bits_per_number(settings: dict[str, Any], config: Any, tokens: int) -> float:
    """Return the bits allocated for each number by a 16-bit model, windows and scales counted."""
    cache = QuantForgeCache(**settings)
    x = torch.randn(1, config.num_key_value_heads, tokens, config.head_dim).to(torch.bfloat16)
    cache.update(x, x, 0)
    return 8 * cache.nbytes / (2 * x.numel())


def measure(
    model: Any, tokenizer: Any, prompt: int, decode: int, bias_pairs: int
) -> list[dict[str, Any]]:
    """Return one row for each cache and version of the model, the model's own cache first."""
    ids = held_out_tokens(tokenizer, prompt + decode).to(model.device)
    prompts = needle_prompts(tokenizer, prompt)
    versions = {
        "as trained": model,
        "outlier channels": with_outlier_channels(model),
        "key bias": with_key_bias(model, pairs=bias_pairs),
    }
    rows = []
    for version, variant in versions.items():
        own = partial(DynamicCache, config=model.config)
        reference = decode_logits(variant, ids, prompt, own())
        makers: dict[str, Any] = {"the model's own": own}
        makers |= {name: partial(QuantForgeCache, **kwargs) for name, kwargs in CACHES.items()}
        for name, make in makers.items():
            result = fidelity(variant, ids, prompt, make, reference)
            kwargs = CACHES.get(name)
            bits = [
                16.0 if kwargs is None else bits_per_number(kwargs, model.config, tokens)
                for tokens in (prompt + decode, 8192)
            ]
            rows.append(
                {
                    "model": version,
                    "cache": name,
                    "kl_mean": result.kl_mean,
                    "kl_p99": result.kl_p99,
                    "top1": result.top1,
                    "perplexity": result.perplexity,
                    "reference_perplexity": result.reference_perplexity,
                    "bits_per_number": bits[0],
                    "bits_per_number_at_8k": bits[1],
                    "needles": recalled(variant, tokenizer, prompts, make),
                }
            )
            print(
                f"{version:17} {name:28} KL {result.kl_mean:.5f} (p99 {result.kl_p99:.4f})  top-1 "
                f"{result.top1:.3f}  needles {rows[-1]['needles']:.2f}  "
                f"{bits[0]:.2f} bits per number, {bits[1]:.2f} at 8k",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--bias-pairs", type=int, default=1, help="RoPE pairs with a key bias")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default=None, help="of the result; default kv_fidelity_MODEL")
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    rows = measure(model, tokenizer, args.prompt, args.decode, args.bias_pairs)
    settings = {
        "model_path": args.model.name,
        "prompt": args.prompt,
        "decode": args.decode,
        "bias_pairs": args.bias_pairs,
    }
    name = args.name or f"kv_fidelity_{args.model.name}"
    print(save(name, args.device, [settings | row for row in rows]))


if __name__ == "__main__":
    main()
