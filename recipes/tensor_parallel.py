"""Decode with a model divided among several processes, each with its part of a quantized cache.

Prints tokens per second and the bytes of the cache on each rank, for 1, 2 and 4 ranks. With GPUs
each rank has its own; without, ranks are simulated: they share the cores of this machine, so only
the bytes mean anything. Or, on one or more machines, with as many ranks as are started:

    torchrun --nproc-per-node 2 recipes/tensor_parallel.py MODEL

Asserted: all ranks decode the same tokens, and the bytes of the cache are divided by the ranks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from quantforge import QuantForgeCache

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
SMALL = SIZES | {"intermediate_size": 128, "num_hidden_layers": 2}


def decode(model, prompt: int, new: int, bits: int) -> dict:
    """Return what this rank saw: tokens, seconds for a new token, bytes of its cache."""
    ids = (torch.arange(prompt, device=model.device)[None] * 31) % model.config.vocab_size
    cache = QuantForgeCache(model.config, bits=bits)
    tokens = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    found = [int(tokens)]
    start = time.perf_counter()
    for _ in range(new):
        tokens = model(tokens, past_key_values=cache).logits.argmax(-1)
        found.append(int(tokens))
    seconds = time.perf_counter() - start
    return {"tokens": found, "tokens_per_s": new / seconds, "cache_bytes": cache.nbytes}


@torch.no_grad()
def rank_of(args: argparse.Namespace, model: str) -> list[dict]:
    """Run as one rank of the group that the environment describes; return what each rank saw."""
    logging.disable_progress_bar()
    world = int(os.environ["WORLD_SIZE"])
    plan = DistributedConfig(tp_plan="auto", tp_size=world)
    where = {"device_map": args.device} if world == 1 else {"distributed_config": plan}
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **where).eval()
    if args.device == "cuda":  # kernels are compiled when they are first needed
        decode(loaded, args.prompt, args.new, args.bits)
    seen: list = [None] * world
    distributed.all_gather_object(seen, decode(loaded, args.prompt, args.new, args.bits))
    return seen


def join_group(args: argparse.Namespace, **kwargs) -> None:
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if args.device == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=5), **kwargs)


def spawned(rank: int, world: int, args: argparse.Namespace, model: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    store = distributed.FileStore(f"{folder}/store{world}", world)
    join_group(args, store=store, rank=rank, world_size=world)
    seen = rank_of(args, model)
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(seen))
    distributed.destroy_process_group()


def row_of(seen: list[dict]) -> dict:
    """Return the row of a group of ranks."""
    assert all(rank["tokens"] == seen[0]["tokens"] for rank in seen), "ranks differ in tokens"
    return {
        "ranks": len(seen),
        "tokens_per_s": min(rank["tokens_per_s"] for rank in seen),
        "cache_bytes_per_rank": [rank["cache_bytes"] for rank in seen],
    }


def show(rows: list[dict], device: str) -> None:
    note = "one GPU each" if device == "cuda" else "simulated: ranks share the cores of this host"
    print(f"{'ranks':>5} {'tokens/s':>9} {'cache KiB per rank':>19}   {note}")
    for row in rows:
        largest = max(row["cache_bytes_per_rank"]) / 1024
        print(f"{row['ranks']:5} {row['tokens_per_s']:9.1f} {largest:19.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="path or hub name; random weights if omitted")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a smaller model, 512 + 8 tokens")
    args = parser.parse_args()
    if args.small:
        args.prompt, args.new = 512, 8
    if args.device == "cuda":
        args.ranks = [n for n in args.ranks if n <= torch.cuda.device_count()]
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or f"{folder}/model"
        if args.model is None:  # the same on every rank, also of several machines
            torch.manual_seed(args.seed)
            LlamaForCausalLM(LlamaConfig(**(SMALL if args.small else SIZES))).save_pretrained(model)
        if "RANK" in os.environ:
            join_group(args)
            rows = [row_of(rank_of(args, model))]
        else:
            multiprocessing.set_forkserver_preload(["transformers.generation", "quantforge.llm"])
            rows = []
            for world in args.ranks:
                job = (world, args, model, folder)
                start_processes(spawned, job, nprocs=world, start_method="forkserver")
                rows.append(row_of(json.loads(Path(folder, f"{world}.json").read_text())))
    if int(os.environ.get("RANK", 0)) == 0:
        show(rows, args.device)
        if args.json is not None:
            args.json.write_text(json.dumps(rows))
    whole = sum(rows[0]["cache_bytes_per_rank"])
    assert all(n * row["ranks"] == whole for row in rows for n in row["cache_bytes_per_rank"])


if __name__ == "__main__":
    main()
