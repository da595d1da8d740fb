"""A token through plain `generate()`: what a user of a static cache waits for.

    python -m benchmarks.generate_step [--cases '*-8k-b1' ...] [--output DIR]

The model and the caches are those of `benchmarks.decode_step`; here `model.generate()` itself
runs, compiles its decoding step as it does for any cache that can be compiled, picks greedily, and
checks after each token whether to stop. Two calls that go on with the same cache differ by LONG -
SHORT tokens and nothing else; a token takes the difference of their times by that, the median of
REPETITIONS. Rows go to `<output>/generate_step_<device>.jsonl`.
"""

from __future__ import annotations

import statistics
import sys
import time
from fnmatch import fnmatch
from typing import Any

import torch

from benchmarks.decode_model import fill, make_cache
from benchmarks.decode_step import (
    BATCHES,
    CONTEXTS,
    SMALL_BATCHES,
    SMALL_CONTEXTS,
    Runner,
    StepCase,
    all_cases,
    parse,
)
from benchmarks.record import environment, put_row, slug

WARMUP, SHORT, LONG, REPETITIONS = 8, 16, 80, 3


def token_ms(runner: Runner, case: StepCase, batch: int) -> list[float]:
    """Return milliseconds per token of each repetition."""
    model, device = runner.model, runner.device
    model.generation_config.eos_token_id = None
    room = case.tokens + 1 + WARMUP + REPETITIONS * (SHORT + LONG)
    cache = make_cache(case.cache, model.config, -(-room // 64) * 64)
    fill(cache, case.cache, model.config, batch, case.tokens, runner.like)
    ids = torch.zeros((batch, case.tokens + 1), dtype=torch.int64, device=device)

    def seconds(new: int) -> float:
        nonlocal ids
        start = time.perf_counter()
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(WARMUP)
    found = []
    for _ in range(REPETITIONS):
        short, long = seconds(SHORT), seconds(LONG)
        found.append(1e3 * (long - short) / (LONG - SHORT))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure the cases asked for; return the exit status."""
    args = parse(arguments)
    contexts, batches = (SMALL_CONTEXTS, SMALL_BATCHES) if args.small else (CONTEXTS, BATCHES)
    begin, where = time.perf_counter(), environment(args.device, args.commit)
    with torch.no_grad():
        runner = Runner(args)
        path = args.output / f"generate_step_{slug(args.device)}.jsonl"
        for case in all_cases(contexts, batches):
            if case.batch is None or not any(fnmatch(case.name, p) for p in args.cases):
                continue
            if time.perf_counter() - begin > args.seconds:
                print("no time left for", case.name)
                continue
            row: dict[str, Any] = {"case": case.name, "cache": case.cache}
            row |= {"context": case.tokens, "batch": case.batch, "compiled": case.compiled}
            times = token_ms(runner, case, case.batch)
            runner.release()
            row |= {"token_ms": round(statistics.median(times), 3)}
            row |= {"low_ms": round(min(times), 3), "high_ms": round(max(times), 3)}
            put_row(path, row | {"model": "small" if args.small else "Llama-3-8B shape"}
                    | {"environment": where})  # fmt: skip
            print(f"{case.name:28} {row['token_ms']:8.2f} ms through generate()", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
