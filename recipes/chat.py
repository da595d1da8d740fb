"""Talk to a language model in a terminal; what was said stays in a few bits.

Each line of standard input is a turn: its tokens, and nothing before them, run through the model,
and the answer is printed as it is made. A model without a chat template gets lines as they are.
Prints a table of the turns with the bytes of the cache. Asserted: every turn computed its own
tokens alone, and a long conversation takes fewer bytes than in the model's own cache.
`--small` plays a fixed conversation with the tiny model that ships with quantforge.

    python recipes/chat.py HuggingFaceTB/SmolLM2-1.7B-Instruct --bits 4
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from quantforge import QuantForgeCache

TINY = Path(__file__).parent / "assets" / "tiny-lm"


def scripted() -> list[str]:
    """Return a conversation for a model of source code: a long file, then beginnings to go on."""
    text = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text("utf-8")[:3200]
    return [text, "\n\ndef wrap(text, ", "\n\nclass Text", "\n\ndef indent("]


def typed() -> Iterator[str]:
    """Yield lines until the end of the input or an empty line."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


class Chat:
    """A conversation: messages, their ids, and a cache of all of these but the last."""

    def __init__(self, model: Any, tokenizer: Any, bits: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.cache = QuantForgeCache(model.config, bits=bits)
        self.messages: list[dict[str, str]] = []
        self.ids = torch.empty(1, 0, dtype=torch.long, device=model.device)

    def encode(self, text: str) -> torch.Tensor:
        """Return the tokens (1, n) that a turn adds, as the model's template writes it."""
        begin = self.ids.shape[1] == 0
        if self.tokenizer.chat_template is not None:
            write = partial(self.tokenizer.apply_chat_template, tokenize=False)
            before = write(self.messages) if self.messages else ""
            self.messages.append({"role": "user", "content": text})
            text = write(self.messages, add_generation_prompt=True).removeprefix(before)
            begin = False  # templates write their own begin of text
        new = self.tokenizer(text, return_tensors="pt", add_special_tokens=begin).input_ids
        return new.to(self.model.device)

    def turn(self, text: str, new_tokens: int) -> tuple[int, int, float]:
        """Answer; return how many tokens were read, how many written, and the seconds."""
        prompt = torch.cat([self.ids, self.encode(text)], 1)
        before, start = self.cache.get_seq_length(), time.perf_counter()
        self.ids = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        seconds, written = time.perf_counter() - start, self.ids.shape[1] - prompt.shape[1]
        reply = self.tokenizer.decode(self.ids[0, prompt.shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": reply})
        # the last token is computed with the next turn
        assert self.cache.get_seq_length() == self.ids.shape[1] - 1, "the cache lost a token"
        return self.cache.get_seq_length() - before - written + 1, written, seconds


def own_bytes(model: Any, tokens: int) -> int:
    """Return the bytes of the model's own cache of so many tokens."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_key_value_heads or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * tokens * config.num_hidden_layers * heads * dim * model.dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="path or hub name; the shipped model if omitted")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a fixed conversation, shipped model")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()
    path = TINY if args.small or args.model is None else args.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(args.device)

    chat = Chat(model, tokenizer, args.bits)
    rows = []
    for text in scripted() if args.small else typed():
        length = chat.ids.shape[1]
        read, written, seconds = chat.turn(text, 12 if args.small else args.max_new_tokens)
        rows.append((read, written, seconds, chat.cache.nbytes, own_bytes(model, length)))
        asked = chat.ids.shape[1] - length - written
        assert read == asked + (length > 0), f"{read} tokens computed for a turn of {asked}"
    print(f"\n{'turn':>4} {'read':>6} {'wrote':>6} {'seconds':>8} {'KiB':>8}   {args.bits} bits")
    for i, (read, written, seconds, nbytes, _) in enumerate(rows, 1):
        print(f"{i:4d} {read:6d} {written:6d} {seconds:8.2f} {nbytes / 1024:8.0f}")
    if rows:
        tokens = chat.cache.get_seq_length()
        own = own_bytes(model, tokens)
        print(f"{tokens} tokens; the model's own cache would take {own / 1024:.0f} KiB")
        if tokens > 1000:
            assert chat.cache.nbytes < own, "the quantized cache is larger"


if __name__ == "__main__":
    main()
