"""Bits for each layer of a model's KV cache, by what each loses alone.

Measures the model that ships, or another, on text it was not trained on; prints uniform bits
against allocated ones of the same bytes, on passages held out; saves the settings and continues a
text with a cache made from them. Asserted: no plan costs more than its uniform cache, and what is
recommended loses no more on the passages held out.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from quantforge import QuantForgeCache
from quantforge.llm.evaluation import passages
from quantforge.optimizer import optimize

MODEL = Path(__file__).parent / "assets" / "tiny-lm"
TEXT = Path(sysconfig.get_path("stdlib")) / "argparse.py"  # the model was not trained on it


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=768)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the first sampled token")
    parser.add_argument("--small", action="store_true", help="one budget, short; seconds on a CPU")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir(), "cache.json"))
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = torch.float32 if args.device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()

    sizes = {"bits": args.bits, "prompt": args.prompt, "number_bytes": 2}
    count = args.passages
    if args.small:
        sizes |= {"bits": [2], "choices": (1, 4), "windows": (128,), "prompt": 272}
        count = 4
    tokens = passages(tokenizer, args.text.read_text("utf-8"), count, sizes["prompt"] + 64)
    result = optimize(model, tokens, **sizes)
    print(result)

    for budget in result.budgets:
        chosen, uniform = budget.recommended, budget.uniform
        assert all(plan.nbytes <= uniform.nbytes for plan in budget.mixed), "over budget"
        assert chosen.check.mean() <= uniform.check.mean(), "worse than uniform bits"

    result.config.save(args.output)
    cache = QuantForgeCache.from_file(args.output, model.config)
    prompt = tokens[:1, : sizes["prompt"]].to(model.device)
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=32, pad_token_id=1)
    print(f"\n{args.output}\n{tokenizer.decode(out[0, prompt.shape[1] :])}")


if __name__ == "__main__":
    main()
