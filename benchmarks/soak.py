"""A long run: 100,000 tokens decoded one by one, and what each costs in time and memory.

    python -m benchmarks.soak [--models growing sliding] [--tokens 100000] [--plot docs]

A step is split into attention (which must read more as the history grows), the append of the cache,
and the rest of the model. `growing` attends to everything, its positions wrapped to stay in the
range of RoPE; `sliding` to a window. Asserted: what is held grows by the bytes of the packed rows
and nothing else, what is allocated stays within the slack of the buffers, and the append and the
rest of a step take no longer at the end than at the start.

Rows of `--every` tokens go to `<output>/soak_<model>_<device>.json`. On a CPU times are CPU times
(OMP_NUM_THREADS=1), which other processes of a machine hardly disturb.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from benchmarks.record import RESULTS, load, save, slug
from quantforge import QuantForgeCache
from quantforge.llm.options import CacheConfig
from quantforge.llm.segments import SegmentedTensor
from quantforge.llm.store import GROWTH_PAGES

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
WINDOW = 2048
SLACK = 1.3
"""Allocated bytes per held byte: packed buffers grow by an eighth; those of a sliding window keep
an eighth of it in dead rows before they are reclaimed. Room for pages comes on top."""
SLOWER = 1.5
"""Times as long that a part of the step may take at the end: machines are noisy, growth is not."""


def make_model(kind: str, device: str) -> Any:
    """Return a random model: "growing" (full attention) or "sliding"."""
    torch.manual_seed(0)
    if kind == "growing":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().to(device)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)).eval().to(device)


class Clock:
    """Seconds spent in parts of a step; on the CPU those that the process was given."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self.spent: dict[str, float] = {"attention": 0.0, "append": 0.0}

    def now(self) -> float:
        if not self._on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, part: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            out = function(*args, **kwargs)
            self.spent[part] += self.now() - start
            return out

        return call

    @contextmanager
    def watching(self, cache: Any) -> Iterator[None]:
        """Time the attention of all models and the appends of a cache."""
        sdpa = self.timed("attention", F.scaled_dot_product_attention)
        with (
            mock.patch.object(F, "scaled_dot_product_attention", sdpa),
            mock.patch.object(cache, "update", self.timed("append", cache.update)),
        ):
            yield


def held_bytes(cache: Any) -> int:
    """Return the bytes of the rows that a cache holds, without the slack of its buffers."""
    return sum(
        t.nbytes_packed if isinstance(t, SegmentedTensor) else t.numel() * t.element_size()
        for layer in cache.layers
        for t in (layer.keys, layer.values)
    )


def row_bytes(cache: Any) -> int:
    """Return the bytes of one packed token in all layers, counted from the codes."""
    packed = [t.packed for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(
        t.shape[0] * t.shape[1] * (t._packed.shape[-1] + t._scales.shape[-1] * 2) for t in packed
    )


def process_bytes(device: str) -> int:
    """Return what the process holds of the device's memory."""
    if device == "cuda":
        return torch.cuda.memory_reserved()
    statm = Path("/proc/self/statm")  # Linux only
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


@torch.inference_mode()
def run(
    kind: str, device: str, tokens: int, every: int, keep: Callable[[list], Any], **settings: Any
) -> list[dict[str, Any]]:
    """Decode so many tokens and return a row for each `every` of them; `keep` sees them grow."""
    model, clock = make_model(kind, device), Clock(device)
    cache = QuantForgeCache(model.config, **settings)
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    rows = []
    with clock.watching(cache):
        parts: dict[str, list[float]] = {"attention": [], "append": [], "rest": [], "step": []}
        for n in range(1, tokens + 1):
            position = torch.tensor([[(n - 1) % SIZES["max_position_embeddings"]]], device=device)
            clock.spent = dict.fromkeys(clock.spent, 0.0)
            start = clock.now()
            out = model(token, past_key_values=cache, position_ids=position)
            seconds = clock.now() - start
            token = out.logits[:, -1:].argmax(-1)
            for name, value in clock.spent.items():
                parts[name].append(1e3 * value)
            parts["rest"].append(1e3 * (seconds - sum(clock.spent.values())))
            parts["step"].append(1e3 * seconds)
            if n % every == 0:
                rows.append({"tokens": n} | _summary(parts) | _memory(cache, device))
                parts = {name: [] for name in parts}
                print(_line(kind, rows[-1]), flush=True)
                keep(rows)
    return rows


def _summary(parts: dict[str, list[float]]) -> dict[str, float]:
    out = {f"{name}_ms": statistics.median(times) for name, times in parts.items()}
    # packing happens in one step of a page: the median does not see it
    out["append_mean_ms"] = statistics.fmean(parts["append"])
    return out | {"append_max_ms": max(parts["append"])}


def _memory(cache: Any, device: str) -> dict[str, int]:
    keys = cache.layers[0].keys
    packed = keys.n_packed if isinstance(keys, SegmentedTensor) else 0
    dense = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return {
        "held_bytes": held_bytes(cache),
        "allocated_bytes": cache.nbytes,
        "packed_tokens": packed,
        "dense_tokens": keys.shape[-2] - packed,
        "packed_row_bytes": row_bytes(cache) if packed else 0,
        "dense_row_bytes": sum(t.shape[1] * t.shape[3] * t.element_size() for t in dense),
        "process_bytes": process_bytes(device),
    }


def _line(kind: str, row: dict[str, Any]) -> str:
    return (
        f"{kind:8} {row['tokens']:7} tokens  step {row['step_ms']:7.3f} ms = attention "
        f"{row['attention_ms']:7.3f} + append {row['append_ms']:.3f} (mean "
        f"{row['append_mean_ms']:.3f}, max {row['append_max_ms']:.2f}) + rest {row['rest_ms']:.3f}"
        f"   held {row['held_bytes'] / 2**20:.2f} MiB, allocated "
        f"{row['allocated_bytes'] / 2**20:.2f}, process {row['process_bytes'] / 2**20:.0f}"
    )


def check(rows: list[dict[str, Any]], page_size: int, timed: bool = True) -> None:
    """Raise AssertionError unless a run grew by its packed rows and took constant time beside."""
    full = [row for row in rows if row["packed_tokens"]]
    assert len(full) >= 2, "too few tokens: nothing was packed in two of the rows"
    for before, after in pairwise(full):
        packed, dense = (after[f"{k}_tokens"] - before[f"{k}_tokens"] for k in ("packed", "dense"))
        expected = packed * before["packed_row_bytes"] + dense * before["dense_row_bytes"]
        assert after["held_bytes"] - before["held_bytes"] == expected, (before, after)
    for row in full:
        room = page_size * (row["dense_row_bytes"] + (GROWTH_PAGES + 1) * row["packed_row_bytes"])
        assert row["allocated_bytes"] <= SLACK * row["held_bytes"] + room, row
    third = max(1, len(full) // 3)
    for name in ("append_mean_ms", "rest_ms") if timed else ():
        start, end = (
            statistics.median(row[name] for row in part) for part in (full[:third], full[-third:])
        )
        assert end <= SLOWER * start, f"{name} rose from {start:.3f} to {end:.3f}"


def draw(kind: str, name: str, folder: Path, path: Path) -> None:
    """Draw a stored run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "quantforge"  # the same file for the same rows
    import matplotlib.pyplot as plt

    stored = load(name, folder)
    rows, where = stored["rows"], stored["environment"]
    tokens = [row["tokens"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for part, color in (("attention", "#0571b0"), ("append_mean", "#e66101"), ("rest", "#555555")):
        label = part.removesuffix("_mean")
        left.plot(tokens, [row[f"{part}_ms"] for row in rows], color=color, label=label)
    left.set_ylabel("ms per token")
    for part, color in (("held", "#0571b0"), ("allocated", "#e66101")):
        right.plot(tokens, [row[f"{part}_bytes"] / 2**20 for row in rows], color=color, label=part)
    right.set_ylabel("MiB of keys and values")
    for axes in (left, right):
        axes.set_xlabel("tokens decoded")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{kind} cache, 4 bits, {where['device']}, {where['date']}", fontsize=10)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=("growing", "sliding"), default=["growing", "sliding"]
    )
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=1000, help="tokens of a row")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, help="folder for soak_*.svg")
    parser.add_argument("--untimed", action="store_true", help="do not assert times")
    args = parser.parse_args(arguments)
    for kind in args.models:
        name = f"soak_{kind}_{slug(args.device)}"
        keep = partial(save, name, args.device, folder=args.output)
        rows = run(kind, args.device, args.tokens, args.every, keep, bits=args.bits)
        if args.plot is not None:
            draw(kind, name, args.output, args.plot / f"{name}.svg")
        check(rows, CacheConfig().page_size, timed=not args.untimed)


if __name__ == "__main__":
    main()
