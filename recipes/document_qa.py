"""Ask questions about a long document that was read once.

The first run reads the document into a quantized cache and saves it; later questions and runs load
that file and read the question alone. The file is named after the document, the model and the bits,
so another document gets another file. Prints the time of each answer with and without it.
Asserted: the answers are those of a fresh read, and with `--small`, where the document has codes
planted in it, those codes. `--small` uses the tiny model that ships with quantforge.

    python recipes/document_qa.py report.txt "What did revenue do?" --model Qwen/Qwen3-4B
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from quantforge import QuantForgeCache

TINY = Path(__file__).parent / "assets" / "tiny-lm"
CODES = {"amber_fox1": "40718", "silver_key2": "92635", "quiet_river3": "15084"}


def planted_document() -> str:
    """Return held-out Python source with a secret code at each quarter."""
    source = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text("utf-8")
    lines = source[:1500].splitlines(keepends=True)
    for i, (name, code) in reversed(list(enumerate(CODES.items(), 1))):
        lines.insert(len(lines) * i // 4, f"# The secret code of {name} is {code}.\n")
    return "".join(lines)


class Reader:
    """A document in a model's cache, from the folder of caches or read now."""

    def __init__(self, model: Any, tokenizer: Any, document: str, bits: int, folder: Path) -> None:
        self.model, self.tokenizer, self.bits = model, tokenizer, bits
        self.ids = tokenizer(document, return_tensors="pt").input_ids.to(model.device)
        name = f"{model.config.name_or_path}\n{bits}\n{document}"
        self.file = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"

    @torch.no_grad()
    def read(self) -> QuantForgeCache:
        """Return a cache into which the document was read now."""
        cache = QuantForgeCache(self.model.config, bits=self.bits)
        self.model(self.ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def open(self) -> QuantForgeCache:
        """Return the cache of the document, loaded if it was ever saved."""
        if not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.read().save(self.file, model=self.model)
        return QuantForgeCache.load(self.file, model=self.model)

    def ask(self, question: str, cache: QuantForgeCache, new_tokens: int) -> str:
        """Return the answer; the cache holds the document before and the question after it."""
        more = self.tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([self.ids, more.to(self.ids.device)], 1)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", nargs="?", type=Path, help="a text file")
    parser.add_argument("question", nargs="*")
    parser.add_argument("--model", help="path or hub name; the shipped model if omitted")
    parser.add_argument("--caches", type=Path, help="folder of caches; default: a temporary one")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="shipped model, planted codes")
    args = parser.parse_args()
    if not args.small and (args.document is None or not args.question):
        parser.error("give a document and a question, or --small")
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()
    path = TINY if args.small or args.model is None else args.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(args.device)
    if args.small:
        document, new_tokens = planted_document(), 8
        questions = [f"\n# Recall: the secret code of {name} is" for name in CODES]
    else:
        document, new_tokens = args.document.read_text("utf-8"), args.max_new_tokens
        questions = [f"\n\nQuestion: {question}\nAnswer:" for question in args.question]

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.caches or Path(temporary)
        reader = Reader(model, tokenizer, document, args.bits, folder)
        start = time.perf_counter()
        prefix = reader.open()
        print(f"{reader.ids.shape[1]} tokens, ready in {time.perf_counter() - start:.2f} s, "
              f"{reader.file.stat().st_size / 1024:.0f} KiB\n")  # fmt: skip
        print(f"{'fresh, ms':>10} {'cached, ms':>10}   answer")
        for i, question in enumerate(questions):
            start = time.perf_counter()
            expected = reader.ask(question, reader.read(), new_tokens)
            fresh, start = time.perf_counter() - start, time.perf_counter()
            answer = reader.ask(question, prefix.fork(), new_tokens)
            cached = time.perf_counter() - start
            print(f"{1e3 * fresh:10.0f} {1e3 * cached:10.0f}   {answer!r}")
            assert answer == expected, "the saved cache gives another answer"
            if args.small:
                code = list(CODES.values())[i]
                assert code in answer, f"the code is {code}"


if __name__ == "__main__":
    main()
