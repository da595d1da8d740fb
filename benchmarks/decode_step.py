"""End to end: tokens per second and peak memory of a decode step of a Llama-3-8B-shaped model.

    python -m benchmarks.decode_step [--cases 'quantforge4-*' '*-8k-b1'] [--list] [--output DIR]

The weights are random and made on the device; the cache is filled with random keys and values
without running a prompt. A case is CACHE-CONTEXT-bBATCH; batch "max" is the largest that fits.
Caches: `dynamic` and `quantforge4` run eagerly, `static` (transformers' own) and
`quantforge4-static` under torch.compile with CUDA graphs.
Cases that do not fit are recorded as such, and no case is started after `--seconds`.

Rows go to `<output>/decode_step_<gpu>.jsonl` as they are measured. `--small` is a tiny model on
the CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.breakdown import breakdown
from benchmarks.ceiling import ceilings
from benchmarks.decode_model import (
    CACHES,
    LLAMA_3_8B,
    SMALL,
    fill,
    is_static,
    make_cache,
    needed_bytes,
    random_model,
    step_bytes,
)
from benchmarks.measure import WrongResultError
from benchmarks.record import RESULTS, environment, put_row, slug

Step = Callable[[], torch.Tensor]
CONTEXTS = {"8k": 8192, "32k": 32768, "128k": 131072}
SMALL_CONTEXTS = {"256": 256}
BATCHES = ("1", "8", "16", "max")
SMALL_BATCHES = ("1", "2")
DEFAULT_CASES = ("dynamic-*", "static-*", "quantforge4-*")
WARMUP = {"eager": 3, "compiled": 6}
PROFILED = 3
MAX_STEPS = 64
"""A page of the packed cache: so many steps hold one packing of pages, which the mean shows."""
SPARE_BYTES = 2 << 30
SMALLER = 0.9
"""What a batch is multiplied with after running out of memory, up to three times."""


@dataclass(frozen=True)
class StepCase:
    """A cache holding `tokens` tokens for each of `batch` sequences (None: as many as fit)."""

    cache: str
    context: str
    tokens: int
    batch: int | None

    @property
    def name(self) -> str:
        """What `--cases` matches."""
        return f"{self.cache}-{self.context}-b{'max' if self.batch is None else self.batch}"

    @property
    def compiled(self) -> bool:
        """Whether the step is compiled."""
        return is_static(self.cache)


def all_cases(contexts: dict[str, int], batches: tuple[str, ...]) -> list[StepCase]:
    """Return every case, the cheap ones first."""
    return [
        StepCase(cache, context, tokens, None if batch == "max" else int(batch))
        for context, tokens in contexts.items()
        for batch in batches
        for cache in CACHES
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cuda", "cpu"))
    parser.add_argument("--cases", nargs="+", default=DEFAULT_CASES, metavar="PATTERN")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--small", action="store_true", help="a tiny model, context and batch")
    parser.add_argument("--steps", type=int, default=20, help="at least so many are timed")
    parser.add_argument("--case-seconds", type=float, default=8, help="timed, beyond --steps")
    parser.add_argument("--seconds", type=float, default=360, help="no case starts later")
    parser.add_argument("--no-breakdown", action="store_true")
    parser.add_argument("--compile-backend", default="inductor", help="of the static cache")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="where the working tree has no git history")
    args = parser.parse_args(arguments)
    if args.small and args.output == RESULTS:
        parser.error(
            "a small model is for tests and does not belong among the results: --output DIR"
        )
    return args


def make_step(model: Any, cache: Any, batch: int, backend: str | None) -> Step:
    """Return a function that decodes one token, forward pass and argmax, and returns the logits."""
    vocabulary = model.config.vocab_size
    device = next(model.parameters()).device
    tokens = [torch.arange(batch, device=device).remainder_(vocabulary)[:, None]]
    forward = model.forward
    if backend is not None:
        options = {"mode": "reduce-overhead"} if backend == "inductor" else {}
        forward = torch.compile(forward, backend=backend, fullgraph=True, **options)

    def step() -> torch.Tensor:
        if backend == "inductor":
            torch.compiler.cudagraph_mark_step_begin()
        logits = forward(input_ids=tokens[0], past_key_values=cache, use_cache=True).logits
        tokens[0] = logits[:, -1].argmax(-1, keepdim=True)
        return logits

    return step


def time_steps(
    step: Step, device: torch.device, warmup: int, least: int, seconds: float
) -> list[float]:
    """Return the times of steps in ms, each waited for, as a loop that reads its tokens does.

    Raises:
        WrongResultError: if the last logits are not finite.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(warmup):
        step()
    wait()
    if device.type == "cuda":  # compiling and recording are not part of a step
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or (len(times) < MAX_STEPS and time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        step()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    if not bool(torch.isfinite(step()).all()):
        raise WrongResultError("NaN or infinity in the logits")
    return times


class Runner:
    """A model on a device, and what every case needs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.ceilings = ceilings(self.device, (8 << 20) if args.small else None)
        dtype = torch.float32 if args.small else torch.bfloat16
        self.model = random_model(SMALL if args.small else LLAMA_3_8B, self.device, dtype)
        self.like = torch.empty(0, dtype=dtype, device=self.device)

    def free_bytes(self) -> int:
        """Return the memory for a cache and its step."""
        self.release()
        if self.device.type != "cuda":
            return 1 << 30
        return torch.cuda.mem_get_info(self.device)[0] - SPARE_BYTES

    def release(self) -> None:
        """Give back what the last case held, its compiled code and graphs included."""
        torch._dynamo.reset()
        if self.device.type == "cuda":
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def batches(self, case: StepCase) -> Iterator[int]:
        """Yield the batch sizes to try, the largest that should fit first."""
        free = self.free_bytes()
        if case.batch is not None:
            if self.needed(case, case.batch) <= free:
                yield case.batch
            return
        batch = 0
        while self.needed(case, batch + 1) <= free and batch < 1024:
            batch += 1
        for _ in range(4):
            if batch:
                yield batch
            batch = int(batch * SMALLER)

    def needed(self, case: StepCase, batch: int) -> int:
        """Return the bytes that a case needs beyond the weights."""
        return needed_bytes(self.model, case.cache, batch, case.tokens)

    def run(self, case: StepCase) -> dict[str, Any]:
        """Return the row of a case."""
        row: dict[str, Any] = {
            "case": case.name,
            "cache": case.cache,
            "context": case.tokens,
            "batch": "max" if case.batch is None else case.batch,
            "compiled": case.compiled,
        }
        tried: list[int] = []
        for batch in self.batches(case):
            try:
                return row | {"batch": batch, "out_of_memory": tried} | self.measure(case, batch)
            except torch.cuda.OutOfMemoryError:
                tried.append(batch)  # the frames that hold its tensors end with this clause
            self.release()
        if tried:
            return row | {"skipped": f"out of memory with batch {', '.join(map(str, tried))}"}
        needed = self.needed(case, case.batch or 1) / 2**30
        free = self.free_bytes() / 2**30
        return row | {"skipped": f"needs {needed:.0f} GiB beside the weights, {free:.0f} are free"}

    def measure(self, case: StepCase, batch: int) -> dict[str, Any]:
        """Return times, memory and breakdown of one batch size."""
        args, cuda = self.args, self.device.type == "cuda"
        backend = args.compile_backend if case.compiled else None
        warmup = WARMUP["compiled" if case.compiled else "eager"]
        room = case.tokens + warmup + max(MAX_STEPS, args.steps) + 1 + PROFILED
        cache = make_cache(case.cache, self.model.config, -(-room // 64) * 64)
        start = time.perf_counter()
        fill(cache, case.cache, self.model.config, batch, case.tokens, self.like)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        filled = time.perf_counter()
        step = make_step(self.model, cache, batch, backend)
        times = time_steps(step, self.device, warmup, args.steps, args.case_seconds)
        median = statistics.median(times)
        nbytes = step_bytes(self.model, case.cache, batch, case.tokens)
        floor = nbytes.floor_ms(self.ceilings["read_gbps"])
        row = {
            "step_ms": round(median, 3),
            "mean_ms": round(statistics.fmean(times), 3),
            "low_ms": round(min(times), 3),
            "high_ms": round(max(times), 3),
            "steps": len(times),
            "tokens_per_s": round(1e3 * batch / median, 2),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
            "weight_bytes": nbytes.weights,
            "cache_bytes": nbytes.cache,
            **self.ceilings,
            "floor_ms": round(floor, 4),
            "over_floor": round(median / floor, 2),
            "fill_s": round(filled - start, 1),
        }
        if not args.no_breakdown:
            row["breakdown"] = breakdown(
                step, cache, median, compiled=case.compiled, steps=PROFILED
            )
        return row


def describe(row: dict[str, Any]) -> str:
    """Return a row as a line of the printed table."""
    if "skipped" in row:
        return f"{row['case']:22} {row['skipped']}"
    parts = row.get("breakdown", {})
    shares = "  ".join(f"{name} {ms:.2f}" for name, ms in parts.get("parts_ms", {}).items())
    gap = parts.get("gap_ms")
    peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:6.1f} GiB"
    return (
        f"{row['case']:22} B={row['batch']:<4} {row['step_ms']:9.2f} ms (mean {row['mean_ms']:.2f})"
        f" {row['tokens_per_s']:9.1f} tokens/s {peak}  floor {row['floor_ms']:.2f} ms "
        f"({row['over_floor']:.1f}x)  [{shares}{'' if gap is None else f'  gap {gap:.2f}'}]"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure the cases asked for; return the exit status."""
    args = parse(arguments)
    contexts, batches = (SMALL_CONTEXTS, SMALL_BATCHES) if args.small else (CONTEXTS, BATCHES)
    chosen = [
        case
        for case in all_cases(contexts, batches)
        if any(fnmatch(case.name, pattern) for pattern in args.cases)
    ]
    if args.list:
        print("\n".join(case.name for case in chosen))
        return 0
    begin = time.perf_counter()
    where = environment(args.device, args.commit)
    with torch.no_grad():
        runner = Runner(args)
        path = args.output / f"decode_step_{slug(args.device)}.jsonl"
        print(f"{where['device']}, read ceiling {runner.ceilings['read_gbps']} GB/s", flush=True)
        for position, case in enumerate(chosen):
            if time.perf_counter() - begin > args.seconds:
                print("no time left for", " ".join(left.name for left in chosen[position:]))
                break
            row = runner.run(case)
            put_row(path, row | {"model": "small" if args.small else "Llama-3-8B shape"}
                    | {"environment": where})  # fmt: skip
            print(describe(row), flush=True)
    print(f"{path}, {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
