"""Speed of the eager torch operators on packed codes, against dense torch on uncompressed data.

Each ratio is dense time / packed time in the same run: above 1 the packed operator is faster.
SDPA is measured as models call it (`enable_gqa`) and with the query heads of a key head folded
into rows, which is faster where no mask forbids it.

    python -m benchmarks.eager_ops [--device cpu] [--threads 1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.record import median_ms, save
from quantforge import QuantSpec, QuantTensor
from quantforge.ops import attention, dequantize, quantize, scores
from quantforge.ops.attention.api import Packed

Calls = dict[str, Callable[[], Any]]
ROWS = 100_000


def scores_cases(device: str) -> Iterator[tuple[dict[str, Any], Calls]]:
    """Yield `q @ X^T` for embeddings: dims, query batches and bits."""
    for dim in (128, 384):
        x = torch.randn(ROWS, dim, device=device)
        for queries in (1, 32):
            q = torch.randn(queries, dim, device=device)
            dense = {
                "fp32": partial(torch.matmul, q, x.T),
                "bf16": partial(torch.matmul, q.bfloat16(), x.bfloat16().T),
            }
            for bits in (1, 2, 3, 4, 8):
                codes = QuantTensor.quantize(x, QuantSpec(dim, bits))
                case = {"op": "scores", "n": ROWS, "dim": dim, "queries": queries, "bits": bits}
                packed = partial(scores, q, codes.packed, codes.scales, codes.spec, impl="eager")
                yield case, {"packed": packed, **dense}


def attention_cases(device: str) -> Iterator[tuple[dict[str, Any], Calls]]:
    """Yield attention of 8 query and 2 KV heads of dim 128 over 32768 packed tokens."""
    k, v = (torch.randn(1, 2, 32768, 128, device=device) for _ in range(2))
    for length in (1, 128):
        q = torch.randn(1, 8, length, 128, device=device)
        folded = q.view(1, 2, 4 * length, 128)
        sdpa = F.scaled_dot_product_attention
        dense = {
            "fp32": partial(sdpa, q, k, v, enable_gqa=True),
            "fp32 folded": partial(sdpa, folded, k, v),
            "bf16": partial(sdpa, q.bfloat16(), k.bfloat16(), v.bfloat16(), enable_gqa=True),
            "bf16 folded": partial(sdpa, folded.bfloat16(), k.bfloat16(), v.bfloat16()),
        }
        for bits in (2, 3, 4, 8):
            codes = [QuantTensor.quantize(t, QuantSpec(128, bits)) for t in (k, v)]
            case = {"op": "attention", "n": 32768, "dim": 128, "queries": length, "bits": bits}
            operands = [Packed(t.packed, t.scales, t.spec) for t in codes]
            yield case, {"packed": partial(attention, q, *operands, impl="eager"), **dense}


def codec_cases(device: str) -> Iterator[tuple[dict[str, Any], Calls]]:
    """Yield quantize and dequantize of float32 vectors, beside a copy of the same data."""
    for dim in (128, 768):
        x = torch.randn(ROWS * 128 // dim, dim, device=device)
        for bits in (2, 4):
            spec = QuantSpec(dim, bits)
            codes = QuantTensor.quantize(x, spec)
            case = {"n": len(x), "dim": dim, "queries": 0, "bits": bits}
            yield (
                {"op": "quantize", **case},
                {
                    "packed": partial(quantize, x, spec, impl="eager"),
                    "copy": x.clone,
                },
            )
            decode = partial(dequantize, codes.packed, codes.scales, spec, impl="eager")
            yield {"op": "dequantize", **case}, {"packed": decode, "copy": x.clone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = []
    with torch.no_grad():
        for cases in (scores_cases, attention_cases, codec_cases):
            for case, calls in cases(args.device):
                times = {name: median_ms(call, args.device) for name, call in calls.items()}
                ratios = {k: t / times["packed"] for k, t in times.items() if k != "packed"}
                rows.append({**case, "packed_ms": times["packed"], "ratios": ratios})
                shown = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
                print(*case.values(), f"{times['packed']:.2f} ms", shown, sep="  ", flush=True)
    print(save(f"eager_ops_{args.device}", args.device, rows))


if __name__ == "__main__":
    main()
