"""One prompt, computed once: saved to a file, loaded again and continued by several questions.

Prints the time and memory of a question that runs the whole prompt, and of one that continues the
loaded cache. Asserted: both give the same text, and forks share the packed rows of the prompt.
`--small` uses the tiny model that ships with quantforge.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from quantforge import QuantForgeCache
from quantforge.llm import patch_model

TINY = Path(__file__).parent / "assets" / "tiny-lm"
QUESTIONS = ("\n\ndef wrap(", "\n\nclass Text", "\n\n# see also")


def buffers(cache: QuantForgeCache) -> dict[int, int]:
    """Return the bytes of the distinct buffers of packed rows, by address."""
    stores = [store for layer in cache.layers for store in layer._stores()]
    return {s.packed.data_ptr(): s.packed.nbytes for s in stores if s.packed is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="path or hub name; the shipped model if omitted")
    parser.add_argument("--file", type=Path, help="where the cache goes; default: a temporary file")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="the shipped model, 8 new tokens")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()
    path = TINY if args.small or args.model is None else args.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(args.device)
    text = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text("utf-8")[:6000]
    prompt = tokenizer(text, return_tensors="pt").input_ids.to(args.device)
    new = 8 if args.small else args.max_new_tokens

    def ask(question: str, cache: QuantForgeCache) -> tuple[list[int], float]:
        more = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([prompt, more.to(args.device)], 1)
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        return out[0, ids.shape[1] :].tolist(), time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        file = args.file or Path(folder) / "prefix.safetensors"
        start = time.perf_counter()
        with patch_model(model, bits=args.bits), torch.no_grad():
            cache = model(prompt, logits_to_keep=1).past_key_values  # a QuantForgeCache
        computed = time.perf_counter() - start
        cache.save(file, model=model, metadata={"text": text})
        start = time.perf_counter()
        prefix = QuantForgeCache.load(file, model=model)
        loaded = time.perf_counter() - start
        print(f"{prompt.shape[1]} tokens: computed in {1e3 * computed:.0f} ms, loaded in "
              f"{1e3 * loaded:.0f} ms, {file.stat().st_size / 1024:.0f} KiB on disk\n")  # fmt: skip
        forks = [prefix.fork() for _ in QUESTIONS]
        shared = {}
        for fork in forks:
            shared |= buffers(fork)
        assert shared == buffers(prefix), "forks have packed rows of their own"
        print(f"{'question':14} {'ms':>6}   continuation")
        for question, fork in zip(QUESTIONS, forks, strict=True):
            expected, _ = ask(question, cache.fork())
            got, seconds = ask(question, fork)
            print(f"{question.strip():14} {1e3 * seconds:6.0f}   {tokenizer.decode(got)!r}")
            assert got == expected, "the loaded cache continues another text"


if __name__ == "__main__":
    main()
