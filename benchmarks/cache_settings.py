"""The settings of QuantForgeCache, one changed at a time: KL on three versions of a model.

python -m benchmarks.cache_settings [--model PATH] [--bias-pairs 1]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from benchmarks.kv_fidelity import MODEL, held_out_tokens
from benchmarks.record import save
from benchmarks.stress_models import with_key_bias, with_outlier_channels
from quantforge import QuantForgeCache
from quantforge.llm.fidelity import decode_logits, fidelity

PROMPT, DECODE = 1024, 128
RULES = [("norm", "unbiased"), ("unbiased", "unbiased"), ("norm", "norm"), ("mse", "mse")]
SETTINGS: list[dict[str, Any]] = [
    {},
    *({"sinks": sinks} for sinks in (0, 4, 32)),
    *({"window": window} for window in (64, 256)),
    *({"page_size": size} for size in (32, 128)),
    {"shift": False},
    {"equalizer": False},
    {"codebook": "e4m3"},
    {"bits": (8, 4)},
    {"bits": (4, 3)},
    *({"bits": 2, "importance": tiers, "budget": 2.4} for tiers in ((3,), (4,), (8,), (4, 8))),
    {"bits": 4, "importance": (8,), "budget": 4.3},
    *(
        {"bits": bits, "key_scale_rule": key, "value_scale_rule": value}
        for bits in (4, 2)
        for key, value in RULES
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--bias-pairs", type=int, default=1)
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    ids = held_out_tokens(tokenizer, PROMPT + DECODE)
    versions = {
        "as trained": model,
        "outlier channels": with_outlier_channels(model),
        "key bias": with_key_bias(model, pairs=args.bias_pairs),
    }
    references = {
        name: decode_logits(variant, ids, PROMPT, DynamicCache())
        for name, variant in versions.items()
    }
    rows = []
    for settings in SETTINGS:
        losses = {}
        for name, variant in versions.items():
            make = partial(QuantForgeCache, **settings)
            losses[name] = fidelity(variant, ids, PROMPT, make, references[name]).kl_mean
        rows.append({"settings": settings, "kl_mean": losses, "bias_pairs": args.bias_pairs})
        print(settings, *(f"{name} {loss:.5f}" for name, loss in losses.items()), sep="  ")
    print(save(f"cache_settings_{args.model.name}", "cpu", rows))


if __name__ == "__main__":
    main()
