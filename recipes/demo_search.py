"""Demo, part 2: embed docstrings of the standard library, keep them in 4 bits, and search them.

The embedding is the mean last hidden state of the tiny model that ships with quantforge: enough
to find docstrings that say alike, not a model for real search. Asserted: scores on the packed
vectors, saved and loaded, find 9 of the 10 nearest neighbours that exact search finds.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import quantforge
from quantforge import QuantForgeConfig, QuantPipeline

MODEL = Path(__file__).parent / "assets" / "tiny-lm"
MAX_TOKENS = 48


def docstrings(limit: int) -> list[str]:
    """Return `limit` different docstrings, evenly taken from all modules."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        texts = (ast.get_docstring(node) or "" for node in nodes)
        found |= {" ".join(text.split())[:200]: None for text in texts if len(text) > 40}
    return list(found)[:: max(1, len(found) // limit)][:limit]


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, texts: list[str], batch: int = 64) -> torch.Tensor:
    """Return unit vectors (len(texts), hidden), centred: a model's states share a large mean."""
    encoded = [tokenizer(text).input_ids[:MAX_TOKENS] for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))  # little padding
    vectors = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = [torch.tensor(encoded[i]) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        real = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
        states = model.model(ids, attention_mask=real.long()).last_hidden_state.float()
        vectors[chosen] = ((states * real[..., None]).sum(1) / lengths[:, None]).cpu()
    return torch.nn.functional.normalize(vectors - vectors.mean(0), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="fewer docstrings")
    parser.add_argument("--query", default="Return a copy of the list, sorted.")
    parser.add_argument("--output", type=Path, default=Path("out"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL).float().to(args.device)

    texts = docstrings(400 if args.small else 2000)
    vectors = embed(model, tokenizer, [args.query, *texts])
    query, vectors = vectors[:1], vectors[1:]
    exact = (vectors[::10] @ vectors.T).topk(10).indices
    print(f"{len(texts)} docstrings of dim {vectors.shape[1]}, {vectors.nbytes} bytes as float32")
    print("bits   bytes   ratio  recall@10")
    recalls = {}
    for bits in (4, 3, 2):
        path = args.output / f"docstrings-{bits}bit.safetensors"
        pipeline = QuantPipeline(vectors.shape[1], QuantForgeConfig(bits=bits))
        quantforge.save_file({"docstrings": pipeline.compress(vectors)}, path)
        codes = quantforge.load_file(path)["docstrings"]
        found = (vectors[::10] @ codes.T).topk(10).indices
        recalls[bits] = (found[:, :, None] == exact[:, None]).any(-1).float().mean().item()
        size = path.stat().st_size
        print(f"{bits:4d} {size:7d} {vectors.nbytes / size:6.2f}x {recalls[bits]:10.3f}")
        if bits == 4:
            nearest = (query @ codes.T).topk(4)
    print(f"\nnearest to {args.query!r} at 4 bits:")
    for score, index in zip(nearest.values[0].tolist(), nearest.indices[0].tolist(), strict=True):
        print(f"  {score:.3f}  {texts[index][:88]}")
    assert recalls[4] > 0.9, f"recall@10 at 4 bits is {recalls[4]}"


if __name__ == "__main__":
    main()
