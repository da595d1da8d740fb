"""What the optimizer finds: bits by layer for a model's cache, or settings for vectors.

    python -m benchmarks.optimizer model [--model PATH] [--passages 32] [--prompt 768]
    python -m benchmarks.optimizer vectors FILE [--latency 1]

Passages are spread over held-out modules of the standard library; every second one is held out of
the choice, too. A file of vectors is .npy, or raw float32 with --dim.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.kv_fidelity import MODEL, TEXTS
from benchmarks.record import save
from quantforge.optimizer import Weights, optimize


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


def of_vectors(args: argparse.Namespace) -> tuple[str, Any]:
    if args.file.suffix == ".npy":
        x = np.load(args.file, mmap_mode="r")
    else:
        x = np.fromfile(args.file, np.float32)
        x = x[: x.size // args.dim * args.dim].reshape(-1, args.dim)
    result = optimize(
        x[: args.limit],
        objective=Weights(latency=args.latency),
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
    vectors = kinds.add_parser("vectors")
    vectors.set_defaults(measure=of_vectors)
    vectors.add_argument("file", type=Path)
    vectors.add_argument("--dim", type=int, default=384)
    vectors.add_argument("--limit", type=int, help="first vectors of the file")
    vectors.add_argument("--metric", default="ip")
    vectors.add_argument("--latency", type=float, default=0.0, help="weight of latency")
    args = parser.parse_args()
    name, result = args.measure(args)
    print(result)
    print(save(args.name or name, args.device, [result.to_dict()]))


if __name__ == "__main__":
    main()
