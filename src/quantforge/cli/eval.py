"""Measure what quantized KV caches change in a model: KL, top-1, perplexity, needles, bytes.

With --max-kl or --min-top1 it is a gate: exit code 1 if a cache does not keep within them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from quantforge.cli.common import (
    LOG,
    PLOT_SUFFIXES,
    add_compute,
    add_force,
    add_json,
    check_new,
    check_plot,
    device_of,
    emit,
    path_ending_in,
)

SUMMARY = "measure what quantized KV caches change in a model"
DTYPES = ("auto", "float32", "bfloat16", "float16")
EXCEEDED = 1


def _bits(text: str) -> int | tuple[int, int]:
    """Parse `4`, or `4,2` for keys and values."""
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise ValueError(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder or name of a causal language model")
    parser.add_argument("--text", type=Path, required=True, help="file to take passages from")
    parser.add_argument("--preset", nargs="+", metavar="NAME", help="presets (default: all)")
    parser.add_argument("--bits", nargs="+", type=_bits, default=[], metavar="B",
                        help="plain settings of so many bits; 4,2 for keys and values")  # fmt: skip
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the first pass")
    parser.add_argument("--decode", type=int, default=128, help="tokens decoded one by one")
    parser.add_argument("--samples", type=int, default=4, help="passages of the text")
    parser.add_argument("--no-needles", action="store_true", help="plant and ask for no codes")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model")
    parser.add_argument("--output", type=Path, help="file for the JSON, besides stdout")
    parser.add_argument("--plot", type=path_ending_in(*PLOT_SUFFIXES), help="file for a plot")
    add_compute(parser, seed=False)
    add_force(parser)
    add_json(parser)
    parser.add_argument("--max-kl", type=float, help="greatest mean KL allowed, nats")
    parser.add_argument("--min-top1", type=float, help="least top-1 agreement allowed, 0 to 1")


def run(args: argparse.Namespace) -> int:
    """Measure, print and judge."""
    check_new(args.output, args.force)
    check_plot(args.plot, args.force)
    device = device_of(args)
    import json

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from quantforge.llm.evaluation import evaluate
    from quantforge.llm.presets import PRESETS, preset_settings

    names = list(PRESETS) if args.preset is None and not args.bits else args.preset or []
    caches: dict[str, dict[str, Any]] = {name: preset_settings(name) for name in names}
    caches |= {f"{_name(bits)} bits": {"bits": bits} for bits in args.bits}
    text = args.text.read_text("utf-8")

    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    result = evaluate(
        model.to(device).eval(),
        tokenizer,
        text,
        caches,
        prompt=args.prompt,
        decode=args.decode,
        samples=args.samples,
        needles=not args.no_needles,
        progress=lambda name: LOG.info("measuring: %s", name),
    )
    if args.output is not None:
        args.output.write_text(json.dumps(result.to_dict(), indent=1) + "\n", "utf-8")
    if args.plot is not None:
        result.plot(args.plot)
    emit(args, result.to_dict(), str(result))
    return _judge(result, args.max_kl, args.min_top1)


def _name(bits: int | tuple[int, int]) -> str:
    return str(bits) if isinstance(bits, int) else f"{bits[0]},{bits[1]}"


def _judge(evaluation: Any, max_kl: float | None, min_top1: float | None) -> int:
    """Return the exit code, and say on stderr what exceeds a limit."""
    code = 0
    for result in evaluation.results[1:]:
        measured = result.fidelity
        if max_kl is not None and not measured.kl_mean <= max_kl:
            LOG.warning("%s: mean KL %.5f is above %g", result.cache, measured.kl_mean, max_kl)
            code = EXCEEDED
        if min_top1 is not None and not measured.top1 >= min_top1:
            LOG.warning("%s: top-1 %.4f is below %g", result.cache, measured.top1, min_top1)
            code = EXCEEDED
    return code
