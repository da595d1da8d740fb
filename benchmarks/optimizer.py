"""What the optimizer finds: bits by layer for a model's cache, or settings for vectors.

    python -m benchmarks.optimizer model [--model PATH] [--passages 32] [--prompt 768]
    python -m benchmarks.optimizer decoded [--model PATH]
    python -m benchmarks.optimizer vectors FILE [--modes --stored 1000000]

Passages are spread over held-out modules of the standard library; every second one is held out of
the choice, too. `decoded` takes the plans that `model` has found, and decodes a module that neither
the choice nor the check has seen token by token, as `quantforge eval` does. A file of vectors is
.npy, or raw float32 with --dim.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from benchmarks.kv_fidelity import MODEL, TEXTS
from benchmarks.record import load, save
from quantforge import QuantForgeCache
from quantforge.llm.evaluation import passages
from quantforge.llm.fidelity import decode_logits, fidelity
from quantforge.optimizer import Space, Weights, optimize

UNSEEN = "textwrap.py"
MODES = Space(
    bits=(2, 3, 4), rotation=("hadamard",), codebook=("lloyd_max",), scale_rule=("unbiased",)
)
WINDOW = 128
"""The default, with which plans and uniform bits differ in nothing but bits."""


def held_out_passages(tokenizer: Any, passages: int, length: int) -> torch.Tensor:
    """Return (passages, length) tokens, spread evenly over the held-out modules."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = [(stdlib / name).read_text("utf-8") for name in TEXTS]
    ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in texts])
    starts = torch.linspace(0, len(ids) - length, passages).long().tolist()
    return torch.stack([ids[start : start + length] for start in starts])


def of_model(args: argparse.Namespace) -> tuple[str, Any]:
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    tokens = held_out_passages(tokenizer, args.passages, args.prompt + args.rest)
    result = optimize(
        model,
        tokens,
        bits=args.bits,
        windows=args.windows,
        prompt=args.prompt,
        number_bytes=2,  # float32 serves to measure; models are kept in 16 bits
        progress=lambda what: print(f"{time.strftime('%X')}  {what}", flush=True),
    )
    return f"optimizer_{args.model.name}", result


def decoded(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """Return KL by teacher-forced decoding of each plan of a stored result, window 128."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    text = (Path(sysconfig.get_path("stdlib")) / UNSEEN).read_text("utf-8")
    ids = passages(tokenizer, text, args.passages, args.prompt + args.rest).to(model.device)
    reference = decode_logits(model, ids, args.prompt, DynamicCache(config=model.config))
    rows = []
    for budget in load(f"optimizer_{args.model.name}")["rows"][0]["budgets"]:
        same = [plan for plan in budget["mixed"] if plan["settings"]["window"] == WINDOW]
        for plan in (budget["uniform"], *same):
            settings = plan["settings"]
            layers = {int(i): layer for i, layer in settings.get("layers", {}).items()}
            make = partial(QuantForgeCache, model.config, **(settings | {"layers": layers}))
            found = fidelity(model, ids, args.prompt, make, reference)
            row = {
                "plan": plan["name"], "prompt": args.prompt, "decode": args.rest,
                "passages": args.passages, "kl_mean": found.kl_mean, "kl_p99": found.kl_p99,
                "top1": found.top1, "bytes_per_token": found.bytes_per_token,
            }  # fmt: skip
            print(row, flush=True)
            rows.append(row)
    return f"optimizer_{args.model.name}_decoded", rows


def of_vectors(args: argparse.Namespace) -> tuple[str, Any]:
    if args.file.suffix == ".npy":
        x = np.load(args.file, mmap_mode="r")
    else:
        x = np.fromfile(args.file, np.float32)
        x = x[: x.size // args.dim * args.dim].reshape(-1, args.dim)
    result = optimize(
        x[: args.limit],
        objective=Weights(latency=args.latency),
        space=MODES if args.modes else None,
        stored=args.stored,
        metric=args.metric,
        device=args.device,
    )
    return f"optimizer_{args.file.name.partition('.')[0]}", result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", help="of the result; default optimizer_MODEL or optimizer_FILE")
    kinds = parser.add_subparsers(required=True)
    model = kinds.add_parser("model")
    model.set_defaults(measure=of_model)
    model.add_argument("--model", type=Path, default=MODEL)
    model.add_argument("--passages", type=int, default=32)
    model.add_argument("--prompt", type=int, default=768)
    model.add_argument("--rest", type=int, default=64, help="tokens whose distributions count")
    model.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    model.add_argument("--windows", type=int, nargs="+", default=[64, 128, 256])
    check = kinds.add_parser("decoded")
    check.set_defaults(measure=decoded)
    check.add_argument("--model", type=Path, default=MODEL)
    check.add_argument("--passages", type=int, default=4)
    check.add_argument("--prompt", type=int, default=1024)
    check.add_argument("--rest", type=int, default=64, help="tokens decoded one by one")
    vectors = kinds.add_parser("vectors")
    vectors.set_defaults(measure=of_vectors)
    vectors.add_argument("file", type=Path)
    vectors.add_argument("--dim", type=int, default=384)
    vectors.add_argument("--limit", type=int, help="first vectors of the file")
    vectors.add_argument("--stored", type=int, help="vectors that share what an index learns")
    vectors.add_argument("--modes", action="store_true", help="modes of an index, default codes")
    vectors.add_argument("--metric", default="ip")
    vectors.add_argument("--latency", type=float, default=0.0, help="weight of latency")
    args = parser.parse_args()
    name, result = args.measure(args)
    if not isinstance(result, list):
        print(result)
        result = [result.to_dict()]
        if "model" in result[0]:
            result[0]["model"] = args.model.name  # not where it lies on this machine
    print(save(args.name or name, args.device, result))


if __name__ == "__main__":
    main()
