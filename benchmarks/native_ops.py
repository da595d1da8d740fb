"""Speed of the native CPU operators against dense torch on uncompressed data, in the same run.

Each ratio is dense time / packed time: above 1 the packed operator is faster. Times are medians of
repeated calls, so what fits into a cache stays there: 19 MB of codes may, 154 MB of fp32 may not.
That is the ratio that targets are for. Where there is a target, the same is measured "cold" too:
calls take turns on copies of the codes, so that all of them come from memory.
Scores count against fp32 matmul. SDPA is measured as models call it (`enable_gqa`) and with the
query heads of a key head folded into rows; the faster one counts. Targets are those of issue 3,
for a processor with AVX-512 VNNI.

    python -m benchmarks.native_ops [--threads 1] [--levels all] [--output DIR] [--name FILE]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.record import RESULTS, median_ms, save
from quantforge import QuantSpec
from quantforge.native.library import LEVELS, Library, level, library
from quantforge.ops import attention, dequantize, quantize, scores
from quantforge.ops.attention.api import Packed
from quantforge.ops.scores.api import Precision

Call = Callable[[], torch.Tensor]
ROUNDS = 3
"""Packed and dense calls take turns, so that a slow moment of the machine meets both."""
COPIES = 16
"""Of the codes in cold calls: of 19 MB codes 300 MB, more than a processor's caches hold."""


@dataclass(frozen=True)
class Case:
    """One native call with its dense baselines.

    Attributes:
        name: of the row.
        packed: the native call.
        dense: baselines by name; fp32 counts, or the fastest.
        exact: what the call should return, in float64, or None.
        max_error: bound of the relative error in the Frobenius norm.
        target: least ratio asked for, or None.
        fields: shape of the case.
        cold: the native call on another copy of the codes each time, or None.
    """

    name: str
    packed: Call
    dense: dict[str, Call]
    exact: torch.Tensor | None
    max_error: float
    target: float | None
    fields: dict[str, Any] = field(default_factory=dict)
    cold: Call | None = None


def in_turn(call: Callable[..., torch.Tensor], codes: list[torch.Tensor]) -> Call:
    """Return a call on copies of the codes, another one each time."""
    copies = itertools.cycle([[t.clone() for t in codes] for _ in range(COPIES)])
    return lambda: call(*next(copies))


def score_cases(rows: int) -> Iterator[Case]:
    """Yield `q @ X^T` for embeddings at one query and a batch, exact and fast."""
    targets = {(1, "exact"): 8.0, (32, "exact"): 1.5, (1, "fast"): 20.0, (32, "fast"): 4.0}
    for dim in (384, 128, 768):
        x = torch.randn(rows, dim)
        for bits in (4, 3, 2, 8) if dim == 384 else (4,):
            spec = QuantSpec(dim, bits)
            codes = quantize(x, spec)
            decoded = dequantize(*codes, spec).double()
            for queries in (1, 32):
                q = torch.randn(queries, dim)
                dense = {
                    "fp32": partial(torch.matmul, q, x.T),
                    "bf16": partial(torch.matmul, q.bfloat16(), x.bfloat16().T),
                }
                for precision in ("exact", "fast") if bits <= 4 else ("exact",):
                    target = targets[queries, precision] if (dim, bits) == (384, 4) else None

                    def packed(
                        *codes: torch.Tensor,
                        q: torch.Tensor = q,
                        spec: QuantSpec = spec,
                        precision: Precision = precision,  # type: ignore[assignment]
                    ) -> torch.Tensor:
                        return scores(q, *codes, spec, precision=precision, impl="native")  # type: ignore[arg-type]

                    yield Case(
                        name="scores",
                        packed=partial(packed, *codes),
                        dense=dense,
                        exact=q.double() @ decoded.T,
                        max_error=1e-6 if precision == "exact" else 1e-2,
                        target=target,
                        fields={"n": rows, "dim": dim, "bits": bits, "queries": queries,
                                "precision": precision},
                        cold=None if target is None else in_turn(packed, list(codes)),
                    )  # fmt: skip


def attention_cases(keys: int) -> Iterator[Case]:
    """Yield one decode step of 4 query heads per key head, dim 128."""
    for kv_heads in (2, 8):
        k, v = (torch.randn(1, kv_heads, keys, 128) for _ in range(2))
        q = torch.randn(1, 4 * kv_heads, 1, 128)
        half = [t.bfloat16() for t in (q, k, v)]
        folded = half[0].view(1, kv_heads, 4, 128)
        sdpa = F.scaled_dot_product_attention
        dense = {
            "bf16 SDPA": partial(sdpa, *half, enable_gqa=True),
            "bf16 SDPA folded": partial(sdpa, folded, *half[1:]),
        }
        for bits in (4, 3, 2, 8) if kv_heads == 8 else (4,):
            spec = QuantSpec(128, bits)
            operands = [Packed(*quantize(t, spec), spec) for t in (k, v)]
            decoded = [dequantize(p.packed, p.scales, spec).double() for p in operands]

            def attend(
                *codes: torch.Tensor, q: torch.Tensor = q, spec: QuantSpec = spec
            ) -> torch.Tensor:
                key, value = Packed(*codes[:2], spec), Packed(*codes[2:], spec)
                return attention(q, key, value, impl="native")[0]

            codes = [t for p in operands for t in (p.packed, p.scales)]
            yield Case(
                name="attention",
                packed=partial(attend, *codes),
                dense=dense,
                exact=sdpa(q.double(), *decoded, enable_gqa=True),
                max_error=1e-5,
                target=2.0 if bits == 4 else None,
                fields={"n": keys, "dim": 128, "bits": bits, "queries": 4 * kv_heads,
                        "kv_heads": kv_heads},
                cold=in_turn(attend, codes) if bits == 4 else None,
            )  # fmt: skip


def codec_cases(rows: int) -> Iterator[Case]:
    """Yield quantize and dequantize beside a copy of the same data."""
    for dim in (128, 768):
        x = torch.randn(rows, dim)
        spec = QuantSpec(dim, 4)
        codes = quantize(x, spec)
        fields = {"n": rows, "dim": dim, "bits": 4, "queries": 0}
        encode = partial(quantize, x, spec, impl="native")
        yield Case("quantize", lambda f=encode: f()[0], {"copy": x.clone}, None, 0, None, fields)
        decode = partial(dequantize, *codes, spec, impl="native")
        yield Case("dequantize", decode, {"copy": x.clone}, None, 0, None, fields)


def measure(case: Case, levels: list[str]) -> Iterator[dict[str, Any]]:
    """Check and time a case on each level, in turn with the baselines."""
    for name in levels:
        with level(name):
            error = None
            if case.exact is not None:
                error = float((case.packed().double() - case.exact).norm() / case.exact.norm())
                assert error < case.max_error, f"{case.name} {case.fields}: error {error:.2e}"
            calls = {"packed": case.packed, **case.dense}
            if case.cold is not None:
                calls["cold"] = case.cold
            rounds = [{k: median_ms(f, "cpu", 7) for k, f in calls.items()} for _ in range(ROUNDS)]
        times = {key: statistics.median(r[key] for r in rounds) for key in calls}
        ms, cold_ms = times.pop("packed"), times.pop("cold", None)
        best = times["fp32"] if "fp32" in times else min(times.values())
        yield {
            "op": case.name, **case.fields, "level": name, "packed_ms": ms, "dense_ms": times,
            "ratio": best / ms, "error": error, "target": case.target,
            "cold_ms": cold_ms, "cold_ratio": None if cold_ms is None else best / cold_ms,
        }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    target = ""
    if row["target"] is not None:
        word = "reached" if row["ratio"] >= row["target"] else "MISSED"
        target = f"  target {row['target']:g}x {word}"
    if row["cold_ms"] is not None:
        target += f"  cold {row['cold_ms']:.2f} ms {row['cold_ratio']:.2f}x"
    shape = f"{row['n']}x{row['dim']} {row['bits']}b q{row['queries']} {row.get('precision', '')}"
    dense = "  ".join(f"{name} {ms:.2f}" for name, ms in row["dense_ms"].items())
    error = "" if row["error"] is None else f"  error {row['error']:.1e}"
    print(
        f"{row['op']:10} {shape:28} {row['level']:8} {row['packed_ms']:8.2f} ms  "
        f"{row['ratio']:6.2f}x  ({dense}){error}{target}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--levels", default="best", choices=("best", "all", *LEVELS))
    parser.add_argument("--rows", type=int, default=100_000, help="embeddings")
    parser.add_argument("--keys", type=int, default=32768, help="tokens of history")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--goals", action="store_true", help="only cases that have a target")
    parser.add_argument("--name", default="native_ops", help="of the file: one for each processor")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    found = library()
    if not isinstance(found, Library):
        raise SystemExit(f"no native library: {found}")
    chosen = {"best": found.levels[-1:], "all": found.levels}.get(args.levels, (args.levels,))
    print(f"levels {', '.join(found.levels)}; {args.threads} threads; {found.path}")
    rows = []
    with torch.no_grad():
        for cases in (score_cases(args.rows), attention_cases(args.keys), codec_cases(args.rows)):
            for case in cases:
                if args.goals and case.target is None:
                    continue
                for row in measure(case, list(chosen)):
                    rows.append(row)
                    show(row)
    print(save(args.name, "cpu", rows, args.output))


if __name__ == "__main__":
    main()
